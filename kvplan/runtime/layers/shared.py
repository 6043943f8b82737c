"""SharedLayer: stores nothing and reads another layer's cache."""

from __future__ import annotations

from kvplan.runtime.layers.budgeted import BudgetedLayer


class SharedLayer(BudgetedLayer):
    """A layer that attends with its own queries over its source layer's keys and values.

    Yang et al. 2024 (KVSharer), arXiv:2410.18517. It owns no slots; the cache hands it what its source's queries saw.
    """

    def select_rows(self, indices: object) -> None:
        """Nothing is stored, so nothing moves."""
