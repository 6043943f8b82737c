"""What a running search shows, and what it keeps of the best policy so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvplan.cli.console import err, note

if TYPE_CHECKING:
    from rich.table import Table

    from kvplan.policy.schema import Policy
    from kvplan.search.confirm import TrialRow


class Watch:
    """The callbacks of a search.

    Args:
        report: Of `console.stages`.
        output: Where the best policy so far is kept.
        trials: In all.
        share: A policy's bytes, as a share of the full cache's.
        prefill: Prepares prompts by index, and is told whom to report to.
        search_prompts: After these are prepared, trials come.
    """

    def __init__(
        self,
        report: Callable[..., None],
        output: Path,
        trials: int,
        share: Callable[[Policy], float],
        prefill: Callable[[Sequence[int], Callable[[int, int], None]], None],
        search_prompts: Sequence[int],
    ) -> None:
        self._report, self._output, self._trials = report, output, trials
        self._share, self._prefill, self._search_prompts = share, prefill, search_prompts
        self._rows: list[TrialRow] = []
        self._is_explained = False
        self.saved = False

    def callbacks(self) -> dict[str, Any]:
        """As keywords of `search`."""
        return {
            "prepare": self.prepare,
            "on_trial": self.on_trial,
            "on_resume": self.on_resume,
            "on_best": self.on_best,
            "on_confirm": lambda done, total: self._report("confirming", done, total),
            "say": note,
        }

    def prepare(self, prompts: Sequence[int]) -> None:
        stage = "prefilling prompts"
        self._report(stage, 0, len(prompts))
        self._prefill(prompts, lambda done, total: self._report(stage, done, total))
        if prompts == self._search_prompts:
            self._report("searching", len(self._rows), self._trials, below=self._table())

    def on_resume(self, rows: Sequence[TrialRow]) -> None:
        """Trials of earlier runs are in the table, but were in an earlier log."""
        self._rows = list(rows)

    def on_trial(self, row: TrialRow, best: TrialRow, count: int) -> None:
        """A line a trial in a log, a table on a terminal."""
        from kvplan.report.search import name_notes, trial_line

        if not self._is_explained:
            self._is_explained = True
            for line in name_notes([row]):
                note(line)
        self._rows.append(row)
        if not err.is_terminal:
            note(trial_line(row, self._held(row), row is best))
        self._report("searching", count, self._trials, below=self._table())

    def _table(self) -> Table | None:
        if not self._rows or not err.is_terminal:
            return None
        from kvplan.report.search import live_table

        return live_table(self._rows, self._held)

    def _held(self, row: TrialRow) -> float:
        return self._share(row.policy)

    def on_best(self, policy: Policy) -> None:
        from kvplan.policy.serialize import save_policy

        save_policy(policy, self._output)
        self.saved = True
