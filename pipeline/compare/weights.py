"""Methods that change weights or add modules to the base: full fine-tuning, the top layers, Houlsby's adapters, LoRA.

In: a frozen base in float32. Out: the parameters to train, now part of its forward pass. The base is a copy of this process alone, loaded for
one method and thrown away.
"""

import importlib.util
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from pipeline.errors import ConfigError
from pipeline.prefix import FrozenBase

TOP_LAYERS = 2  # FT-TOP2 of the paper (section 5.2)
LORA_RANK = 8
_FEED_FORWARD = ("mlp", "feed_forward", "DenseReluDense", "fc2")


def full(base: FrozenBase) -> list[nn.Parameter]:
    """Every weight of the base."""
    return _freed(list(base.model.parameters()))


def top_layers(base: FrozenBase) -> list[nn.Parameter]:
    """The last two layers of the (decoder's) stack."""
    stack = _stacks(base)[-1]
    return _freed([parameter for layer in stack[-TOP_LAYERS:] for parameter in layer.parameters()])


def adapters(base: FrozenBase, share: float, seed: int) -> list[nn.Parameter]:
    """A bottleneck behind attention and feed-forward of every layer, before the residual is added (Houlsby et al. 2019).

    They begin as the identity. Layer norms stay as they are.

    Args:
        share: of the base's parameters that the adapters have together, at most, but each is one wide at least.

    Raises:
        ConfigError: the base has no feed-forward part where it is looked for.
    """
    places = [place for stack in _stacks(base) for layer in stack for place in _places(layer)]
    if not any(name in _FEED_FORWARD for _, name in places):
        raise ConfigError(f"adapters: {base.model.config.model_type} has no feed-forward module named {', '.join(_FEED_FORWARD)}")
    width = base.model.get_input_embeddings().weight.shape[1]
    wanted = share * sum(parameter.numel() for parameter in base.model.parameters())
    # 2 · width · middle + width + middle numbers each.
    middle = max(1, int((wanted / len(places) - width) / (2 * width + 1)))
    generator = torch.Generator().manual_seed(seed)
    trained: list[nn.Parameter] = []
    for module, _ in places:
        adapter = _Adapter(width, middle, generator).to(base.device, base.model.dtype)
        module.register_forward_hook(adapter.behind)
        trained += adapter.parameters()
    return trained


class _Adapter(nn.Module):
    """x + up(gelu(down(x)))."""

    def __init__(self, width: int, middle: int, generator: torch.Generator) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, middle), nn.Linear(middle, width)
        with torch.no_grad():
            self.down.weight.copy_(torch.randn(middle, width, generator=generator) / math.sqrt(width))
            for zero in (self.down.bias, self.up.weight, self.up.bias):
                zero.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        changed: torch.Tensor = x + self.up(torch.nn.functional.gelu(self.down(x)))
        return changed

    def behind(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        """Forward hook: attention gives a tuple whose first entry is the states."""
        return (self(output[0]), *output[1:]) if isinstance(output, tuple) else self(output)


def lora(base: FrozenBase) -> list[nn.Parameter]:
    """LoRA of rank 8, alpha 16, on the matrices that PEFT takes by default for this kind of model (queries and values mostly).

    Raises:
        ConfigError: PEFT is not installed, or knows no matrices of such a model.
    """
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("lora needs PEFT: `pip install 'prefixfleet[compare]'`, or leave it out with --method.")
    from peft import LoraConfig, inject_adapter_in_model

    try:
        inject_adapter_in_model(LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, lora_dropout=0.0), base.model)
    except ValueError as error:
        raise ConfigError(f"lora: PEFT takes no {base.model.config.model_type} by itself ({error})") from error
    base.model.eval()
    return [parameter for name, parameter in base.model.named_parameters() if "lora_" in name]


def _freed(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


def _stacks(base: FrozenBase) -> list[list[nn.Module]]:
    """The lists of layers, the encoder's first: module lists whose entries have attention, the outermost ones."""
    found: dict[str, list[nn.Module]] = {}
    for name, module in base.model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found) or not isinstance(module, nn.ModuleList):
            continue
        if len(module) and all(any(hasattr(part, "_prefixfleet_site") for part in layer.modules()) for layer in module):
            found[name] = list(module)
    return sorted(found.values(), key=lambda stack: any(_is_decoder(part) for layer in stack for part in layer.modules()))


def _is_decoder(module: nn.Module) -> bool:
    return str(getattr(module, "_prefixfleet_site", "")).startswith("decoder.")


def _places(layer: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The modules behind which adapters stand, and the last part of their names."""
    taken: list[str] = []
    for name, module in layer.named_modules():
        last = name.rsplit(".", 1)[-1]
        if any(name.startswith(f"{outer}.") for outer in taken):
            continue
        if hasattr(module, "_prefixfleet_site") or last in _FEED_FORWARD:
            taken.append(name)
            yield module, last
