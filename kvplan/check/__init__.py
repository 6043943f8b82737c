"""What a policy costs in quality: its scores on prompts, paired with the full cache."""
