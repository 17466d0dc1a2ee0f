"""Sizes, curricula and learning rates of the needle models."""

from __future__ import annotations

from dataclasses import dataclass, replace

BOS = 0x01
EOS = 0x0A
VOCABULARY = 256


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder in the Qwen3 architecture; token ids are byte values."""

    layers: int = 6
    width: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    mlp_width: int = 768
    rope_base: float = 1e8
    max_positions: int = 131072
    norm_eps: float = 1e-6


@dataclass(frozen=True)
class Curriculum:
    """Sequence lengths, short ones first.

    The next length starts when byte accuracy over all tasks and the first-byte accuracy of both
    gate tasks exceed the threshold at the current length, or when its time is up. Until
    `mixed_from` most batches have the current length; from then on lengths are drawn by weight.

    Attributes
    ----------
    lengths
        Sequence lengths in tokens.
    weights
        Share of each length's batches once lengths are mixed.
    mixed_from
        First length at which all lengths are mixed.
    earliest
        For each length, the fraction of the schedule before which it does not start. The
        wording of facts is learned at any length, so the first part goes to cheap ones.
    current_share
        Share of batches at the current length before lengths are mixed.
    threshold
        Accuracy that ends a stage.
    stage_share
        Largest fraction of the schedule that one stage may take.
    """

    lengths: tuple[int, ...]
    weights: tuple[float, ...]
    mixed_from: int
    earliest: tuple[float, ...]
    current_share: float = 0.65
    threshold: float = 0.95
    stage_share: float = 0.15

    def until(self, longest: int) -> Curriculum:
        """Return this curriculum without the lengths beyond `longest`."""
        count = sum(length <= longest for length in self.lengths)
        return replace(
            self,
            lengths=self.lengths[:count],
            weights=self.weights[:count],
            earliest=self.earliest[:count],
        )


@dataclass(frozen=True)
class Preset:
    """Everything about a training run but its time and its seed.

    Attributes
    ----------
    block
        Tokens of a micro-batch: constant, so that the compiled regions see one shape. A longer
        sequence takes several blocks.
    accumulate_from
        Length from which two micro-batches make a step.
    prose_weight
        Weight of the loss on haystack prose next to the loss on answers.
    decay_from
        Fraction of the schedule after which the learning rates fall to zero linearly.
    """

    model: ModelConfig
    curriculum: Curriculum
    block: int = 65536
    accumulate_from: int = 16384
    matrix_rate: float = 0.02
    other_rate: float = 3e-3
    warmup_steps: int = 100
    decay_from: float = 0.5
    prose_weight: float = 0.1


_NEEDLE = Preset(
    model=ModelConfig(),
    curriculum=Curriculum(
        lengths=(512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072),
        weights=(1.5, 2, 2, 2, 2, 3, 3, 3.5, 0.5),
        earliest=(0, 0, 0, 0, 0, 0, 0.15, 0.3, 0.5),
        mixed_from=8192,
    ),
)

PRESETS: dict[str, Preset] = {
    "needle": _NEEDLE,
    # A run resumed from the middle of "needle": wordings and the beginnings of long texts remain.
    "needle-finish": replace(
        _NEEDLE,
        curriculum=replace(
            _NEEDLE.curriculum, weights=(0.5, 1.8, 2, 2.2, 3, 2.6, 2.2, 2.6, 0.4), mixed_from=512
        ),
    ),
    # From a finished model: many short sequences, for the wordings that remain to be learned.
    "needle-wordings": replace(
        _NEEDLE,
        curriculum=replace(
            _NEEDLE.curriculum, weights=(1, 3, 3, 3, 3, 2, 1.4, 1.6, 0.2), mixed_from=512
        ),
        matrix_rate=0.013,
        other_rate=2e-3,
        decay_from=0.0,
    ),
    "needle-small": Preset(
        model=ModelConfig(layers=5, width=128, mlp_width=256, max_positions=16384),
        curriculum=Curriculum(
            lengths=(512, 1024, 2048, 4096, 8192, 16384),
            weights=(1, 1, 1.5, 2, 3, 1.5),
            earliest=(0, 0, 0, 0, 0, 0),
            mixed_from=16384,
        ),
    ),
    "smoke": Preset(
        model=ModelConfig(
            layers=2, width=64, heads=2, kv_heads=1, head_dim=32, mlp_width=64, max_positions=2048
        ),
        curriculum=Curriculum(
            lengths=(512, 1024), weights=(1, 1), earliest=(0, 0), mixed_from=1024
        ),
        block=2048,
        accumulate_from=1024,
        warmup_steps=5,
    ),
}
