"""Channel selectors. A new one is a file here and an import line below."""

from kvplan.methods.channels import think
from kvplan.methods.channels.base import ChannelSelector, channel_selectors

__all__ = ["ChannelSelector", "channel_selectors", "think"]
