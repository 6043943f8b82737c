"""The pictures of a report, one a file; a new one is a file and a line here."""

from kvplan.report.plots import budgets as budgets
from kvplan.report.plots import bytes as bytes
from kvplan.report.plots import history as history
from kvplan.report.plots import kept as kept
from kvplan.report.plots import parameters as parameters
from kvplan.report.plots import pareto as pareto
from kvplan.report.plots import sensitivity as sensitivity
from kvplan.report.plots.base import NARROW, WIDE, Page, Plot, Table, in_order, plots

__all__ = ["NARROW", "WIDE", "Page", "Plot", "Table", "in_order", "plots"]
