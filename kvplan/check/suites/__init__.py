"""Public suites in their published file formats. A new one is a file here and an import line below."""

from kvplan.check.suites import gsm8k, longbench, loogle, ruler
from kvplan.check.suites.base import Suite, suites
from kvplan.check.suites.load import suite_examples

__all__ = ["Suite", "gsm8k", "longbench", "loogle", "ruler", "suite_examples", "suites"]
