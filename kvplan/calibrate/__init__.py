"""From a model and prompts to a `Profile`: what each layer's attention needs, measured."""
