"""The profile as a file, checked on reading: whatever is in it, a bad file is one line, never a traceback."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
)

from kvplan.calibrate.precision import Precision
from kvplan.calibrate.profile import Profile
from kvplan.calibrate.statistics import (
    MOMENT_NAMES,
    SHARING_TOKENS,
    LayerProfile,
    Moments,
    SensitivitySums,
    Statistics,
    moment_shape,
)
from kvplan.errors import MethodError, ProfileError
from kvplan.json_fields import Measure, Name, Seconds, Settings
from kvplan.model_spec import DTYPE_BYTES, LayerSpec, ModelSpec


def parse(data: dict[str, Any]) -> Profile:
    """Raises: ProfileError: a field is missing, unknown, of the wrong type, not finite or of the wrong shape."""
    try:
        file = _File.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise ProfileError(f"{where}: {first['msg']}{more}") from error
    return file.to_profile()


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Moments(_Model):
    count: NonNegativeInt
    sum: list[Measure]
    squares: list[Measure]

    def unpack(self, shape: tuple[int, ...], count: int, where: str) -> Moments:
        size = int(np.prod(shape, dtype=object))
        if not len(self.sum) == len(self.squares) == size:
            raise ProfileError(f"{where}: {len(self.sum)} sums and {len(self.squares)} squares; the model has {size}")
        if self.count != count:
            raise ProfileError(f"{where}: a count of {self.count}; there are {count} prompts")
        # Cauchy-Schwarz, with room for the rounding of the sums.
        if any(s * s > count * q * (1 + 1e-6) + 1e-6 for s, q in zip(self.sum, self.squares, strict=True)):
            raise ProfileError(f"{where}: sums and squares contradict each other; the file was edited or damaged")
        return Moments(self.count, np.array(self.sum).reshape(shape), np.array(self.squares).reshape(shape))


class _Layer(_Model):
    cosine: _Moments
    sink_mass: _Moments
    recent_mass: _Moments
    entropy: _Moments
    effective_tokens: _Moments
    key_norm: _Moments
    value_norm: _Moments
    head_agreement: _Moments
    # Profiles of earlier builds have none of these.
    head_cosine: _Moments | None = None
    prefix_tokens: _Moments | None = None
    norm_tokens: _Moments | None = None
    key_sum: str
    value_sum: str


class _LayerSpec(_Model):
    kv_heads: PositiveInt
    key_dim: PositiveInt
    value_dim: PositiveInt
    window: PositiveInt | None


class _Spec(_Model):
    layers: list[_LayerSpec]
    query_heads: PositiveInt
    dtype: str
    max_context_tokens: PositiveInt | None
    model_type: Name
    fingerprint: Annotated[str, Field(pattern=r"^[!-~]{1,100}$")] | None


class _Data(_Model):
    fingerprint: str
    prompts: PositiveInt
    tokens: PositiveInt
    prompt_hashes: list[Name]


class _Sensitivity(_Model):
    settings: Settings
    seconds: Seconds
    moments: dict[Name, dict[str, _Moments]]
    codecs: dict[str, _Moments] = {}  # profiles of the first version have none

    def unpack(self, num_layers: int) -> SensitivitySums:
        moments: dict[str, dict[int, Moments]] = {}
        grids = {tuple(by_share) for by_share in self.moments.values()}
        counts = {m.count for by_share in self.moments.values() for m in by_share.values()}
        if len(grids) > 1 or len(counts) > 1:
            raise ProfileError("sensitivity.moments: the evictors were not measured on the same shares and prompts")
        for name, by_share in self.moments.items():
            moments[name] = {}
            for share, packed in by_share.items():
                where = f"sensitivity.moments.{name}.{share}"
                if not (share.isascii() and share.isdigit() and 0 < int(share) <= 10_000):
                    raise ProfileError(f"{where}: not a share in basis points")
                if packed.count == 0:
                    raise ProfileError(f"{where}: measured on no prompt")
                moments[name][int(share)] = packed.unpack((num_layers,), packed.count, where)
        wanted = {"evictors": list(moments), "shares": [int(s) for s in next(iter(grids), ())]}
        if any(self.settings.get(key) != value for key, value in wanted.items()):
            raise ProfileError("sensitivity.settings: evictors or shares are not those of the moments")
        codecs = {}
        for label, packed in self.codecs.items():
            where = f"sensitivity.codecs.{label}"
            try:
                Precision.parse(label)
            except MethodError as error:
                raise ProfileError(f"{where}: {error}") from error
            if packed.count not in counts:
                raise ProfileError(f"{where}: not measured on the prompts of the evictors")
            codecs[label] = packed.unpack((num_layers,), packed.count, where)
        return SensitivitySums(moments, self.settings, self.seconds, codecs)


class _File(_Model):
    """The file as it is written."""

    kind: str
    schema_version: int
    versions: dict[Name, Name]
    seeds: dict[Name, int]
    spec: _Spec
    data: _Data
    settings: Settings
    seconds: dict[Name, Seconds]
    sharing_prompts: NonNegativeInt
    layers: list[_Layer]
    sensitivity: _Sensitivity | None

    def to_profile(self) -> Profile:
        spec = ModelSpec.from_json(self.spec.model_dump())
        if spec.dtype not in DTYPE_BYTES:
            raise ProfileError(f"spec.dtype: unknown dtype '{spec.dtype}' (known: {', '.join(DTYPE_BYTES)})")
        if not spec.layers or len(self.layers) != len(spec.layers):
            raise ProfileError(f"layers: {len(self.layers)} layers; the model has {len(spec.layers)}")
        if len(self.data.prompt_hashes) != self.data.prompts:
            raise ProfileError(
                f"data.prompt_hashes: {len(self.data.prompt_hashes)} hashes of {self.data.prompts} prompts"
            )
        if self.sharing_prompts > self.data.prompts:
            raise ProfileError(f"sharing_prompts: {self.sharing_prompts} of {self.data.prompts} prompts")
        statistics = Statistics(
            layers=tuple(self._layer(i, layer, spec.layers[i]) for i, layer in enumerate(self.layers)),
            prompt_hashes=tuple(sorted(self.data.prompt_hashes)),
            num_tokens=self.data.tokens,
            sharing_prompts=self.sharing_prompts,
            settings=self.settings,
            seconds=self.seconds,
        )
        sums = self.sensitivity and self.sensitivity.unpack(len(spec.layers))
        profile = Profile(spec, statistics, sums or None, self.seeds, self.versions)
        if profile.data_fingerprint != self.data.fingerprint:
            raise ProfileError("data.fingerprint: not the one of the prompt hashes; the file was edited or damaged")
        return profile

    def _layer(self, i: int, layer: _Layer, spec: LayerSpec) -> LayerProfile:
        moments = {}
        for name in MOMENT_NAMES:
            packed, shape = getattr(layer, name), moment_shape(name, spec)
            where = f"layers.{i}.{name}"
            moments[name] = Moments.none(shape) if packed is None else packed.unpack(shape, self.data.prompts, where)
        key_sum = _unpack_sum(layer.key_sum, spec.kv_heads, spec.key_dim, f"layers.{i}.key_sum")
        value_sum = _unpack_sum(layer.value_sum, spec.kv_heads, spec.value_dim, f"layers.{i}.value_sum")
        return LayerProfile(**moments, key_sum=key_sum, value_sum=value_sum)


def _unpack_sum(text: str, heads: int, dim: int, where: str) -> npt.NDArray[np.float32]:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ProfileError(f"{where}: not base64") from error
    if len(data) != 4 * heads * SHARING_TOKENS * dim:
        raise ProfileError(f"{where}: {len(data)} bytes; the model has {4 * heads * SHARING_TOKENS * dim}")
    array = np.frombuffer(data, dtype="<f4").reshape(heads, SHARING_TOKENS, dim).astype(np.float32)
    if not np.isfinite(array).all():
        raise ProfileError(f"{where}: not finite")
    return array
