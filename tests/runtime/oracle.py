"""Plain-Python oracles: lists of positions, one row and one head at a time. Slow and obvious."""

from __future__ import annotations

import math

import torch


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    raw = [math.exp(v - top) for v in values]
    return [r / sum(raw) for r in raw]


class ListCache:
    """Keeps whole keys in float64 and lists of the positions that are alive, per KV head.

    The same rule for every evictor: when a token enters a full layer, the unprotected token with the lowest score
    leaves (ties: the earliest of the ring), then the query attends, then scores move.
    """

    def __init__(
        self,
        name: str,
        slots: int,
        sinks: int,
        recent: int,
        scaling: float,
        window: int = 32,
        pool: int = 5,
        lag: int = 8,
        history: int = 13,
    ):
        self.name, self.slots, self.sinks, self.recent, self.scaling = name, slots, sinks, recent, scaling
        self.window, self.pool, self.lag, self.history = window, pool, lag, history
        if name == "sliding":
            self.sinks = 0

    def prefill(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """q [Hq, T, D], k and v [Hkv, T, D] float64."""
        self.q, self.k, self.v, (self.heads, T, _) = q, k, v, k.shape
        self.group = q.shape[0] // self.heads
        probs = [[self._row(q[h], k[h // self.group], t) for t in range(T)] for h in range(q.shape[0])]
        self.scores = [self._prompt_scores(probs, g, T) for g in range(self.heads)]
        if self.name == "tova":
            mean = [sum(self.scores[g][j] for g in range(self.heads)) / self.heads for j in range(T)]
            self.scores = [list(mean) for _ in range(self.heads)]
        self.alive = []
        for g in range(self.heads):
            ranked = {j: self.scores[g][j] for j in range(T)}
            for j in range(T):
                if j < self.sinks or j >= T - self.recent:
                    ranked[j] = math.inf
            best = sorted(range(T), key=lambda j: (-ranked[j], -j))[: self.slots]
            self.alive.append(sorted(best))
        # Rings are overwritten from the lowest rank up; new tokens queue behind.
        self.queue = [
            sorted(
                (j for j in self.alive[g] if j >= self.sinks), key=lambda j: (j >= T - self.recent, self.rank(g, j, T))
            )
            for g in range(self.heads)
        ]

    def rank(self, g: int, j: int, T: int) -> tuple[float, int]:
        return (0.0, j) if j >= T - self.recent else (self.scores[g][j], j)

    def _row(self, q: torch.Tensor, k: torch.Tensor, t: int) -> list[float]:
        logits = [float(q[t] @ k[j]) * self.scaling for j in range(t + 1)]
        return softmax(logits) + [0.0] * (k.shape[0] - t - 1)

    def _prompt_scores(self, probs: list, g: int, T: int) -> list[float]:
        mine = [probs[g * self.group + i] for i in range(self.group)]
        if self.name in ("streaming", "sliding"):
            return [float(j) for j in range(T)]
        if self.name == "knorm":
            return [-float(self.k[g, j].norm()) for j in range(T)]
        if self.name == "h2o":
            return [sum(p[t][j] for p in mine for t in range(T)) / self.group for j in range(T)]
        if self.name == "tova":
            return [sum(p[T - 1][j] for p in mine) / self.group for j in range(T)]
        if self.name == "keydiff":
            return self._keydiff(g, T)
        if self.name == "lagkv":
            return self._lagkv(g, T)
        if self.name == "expected":
            return self._expected(g, T)
        if self.name == "scissorhands":
            rows = range(T - min(self.history, T), T)
            return [-sum(p[t][j] <= 1 / (t + 1) for p in mine for t in rows if t >= j) / self.group for j in range(T)]
        w = min(self.window, T)
        votes = [sum(p[t][j] for p in mine for t in range(T - w, T)) / (self.group * w) for j in range(T - w)]
        half = self.pool // 2
        pooled = [sum(votes[max(0, j - half) : j + half + 1]) / self.pool for j in range(T - w)]
        return pooled + [2.0] * w

    def _keydiff(self, g: int, T: int) -> list[float]:
        unit = [self.k[g, j] / self.k[g, j].norm() for j in range(T)]
        # The cosine with the mean direction ranks as the sum of the cosines with every key.
        length = float(sum(unit).norm())
        return [-sum(float(unit[i] @ unit[j]) for i in range(T)) / length for j in range(T)]

    def _lagkv(self, g: int, T: int) -> list[float]:
        scores, start = [1.0] * T, self.sinks
        while start + 2 * self.lag <= T:
            total = [0.0] * self.lag
            for x in (self.k[g], self.v[g]):
                spread = []
                for j in range(start, start + self.lag):
                    scaled = []
                    for c in range(x.shape[1]):
                        later = [float(x[i, c]) for i in range(start + self.lag, start + 2 * self.lag)]
                        scaled.append((float(x[j, c]) - min(later)) / (max(later) - min(later)))
                    mean = sum(scaled) / len(scaled)
                    spread.append(math.sqrt(sum((y - mean) ** 2 for y in scaled) / (len(scaled) - 1)))
                total = [a + b for a, b in zip(total, softmax(spread), strict=True)]
            for rank, i in enumerate(sorted(range(self.lag), key=lambda i: total[i])):
                scores[start + i] = rank / self.lag
            start += self.lag
        return scores

    def _expected(self, g: int, T: int) -> list[float]:
        """Without rotary positions."""
        D, rest = self.k.shape[2], range(self.sinks, T)
        expected = [0.0] * T
        for h in range(g * self.group, (g + 1) * self.group):
            rows = [[float(x) for x in self.q[h, t]] for t in rest]
            mean = [sum(r[c] for r in rows) / len(rows) for c in range(D)]
            logits = []
            for j in rest:
                key = [float(x) for x in self.k[g, j]]
                dots = [sum((r[c] - mean[c]) * key[c] for c in range(D)) * self.scaling for r in rows]
                first = sum(m * x for m, x in zip(mean, key, strict=True)) * self.scaling
                logits.append(first + sum(d * d for d in dots) / len(dots) / 2)
            for j, p in zip(rest, softmax(logits), strict=True):
                expected[j] += p / self.group
        return [(e + 0.02) * float(self.v[g, j].norm()) for j, e in enumerate(expected)]

    def step(self, q: torch.Tensor, k: torch.Tensor) -> list[list[int]]:
        """One new token: q [Hq, D], k [Hkv, D]. Returns what each head attended to."""
        t = self.k.shape[1]
        self.k = torch.cat([self.k, k[:, None]], 1)
        scored = self.name in ("h2o", "tova", "scissorhands")
        for g in range(self.heads):
            if len(self.alive[g]) >= self.slots:
                if scored:
                    free = [j for j in self.alive[g] if j >= self.sinks and j <= t - self.recent]
                    victim = min(free, key=lambda j: self.scores[g][j])
                else:
                    victim = self.queue[g].pop(0)
                self.alive[g].remove(victim)
            self.alive[g].append(t)
            self.queue[g].append(t)
            self.scores[g].append(0.0)
        if scored:
            self._observe(q)
        return [sorted(a) for a in self.alive]

    def _observe(self, q: torch.Tensor) -> None:
        rows = []
        for h in range(q.shape[0]):
            g = h // self.group
            probs = softmax([float(q[h] @ self.k[g, j]) * self.scaling for j in self.alive[g]])
            rows.append(dict(zip(self.alive[g], probs, strict=True)))
        for g in range(self.heads):
            mine = rows[g * self.group : (g + 1) * self.group]
            for j in self.alive[g]:
                if self.name == "h2o":
                    self.scores[g][j] += sum(r[j] for r in mine) / self.group
                elif self.name == "scissorhands":
                    marks = sum(r[j] <= 1 / len(r) for r in mine) / self.group
                    self.scores[g][j] += -self.scores[g][j] / self.history - marks
                else:
                    self.scores[g][j] = sum(r[j] for r in rows) / len(rows)
