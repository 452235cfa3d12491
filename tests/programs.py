"""Small hand-built canonical programs: what front end and `canonicalize` are expected to give, without either."""

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.ops import default_scale, qc
from qcompiler.program import Input, Program, Type

aten = torch.ops.aten
BS = ("batch", "sequence")


class Sketch:
    """A program under construction: inputs, tensors and calls, each with its type."""

    def __init__(self, seed: int = 0) -> None:
        self.graph = fx.Graph()
        self.tensors: dict[str, Tensor] = {}
        self.inputs: list[Input] = []
        self.random = torch.Generator().manual_seed(seed)

    def input(self, name: str, shape: Sequence[int | str], dtype: torch.dtype, default: str = "") -> fx.Node:
        """A graph input."""
        kind = Type(tuple(shape), dtype)
        self.inputs.append(Input(name, kind, default))
        node = self.graph.placeholder(name)
        node.meta["type"] = kind
        return node

    def parameter(self, name: str, *shape: int, spread: float = 0.0, around: float = 0.0) -> fx.Node:
        """A stored tensor with normal random values, by default as spread as its rows are long."""
        if name not in self.tensors:
            scale = spread or shape[-1] ** -0.5
            self.tensors[name] = torch.randn(shape, generator=self.random) * scale + around
        node = self.graph.get_attr(name)
        node.meta["type"] = Type(shape, torch.float32)
        return node

    def constant(self, name: str, value: Tensor) -> fx.Node:
        """A stored tensor with given values."""
        self.tensors[name] = value
        node = self.graph.get_attr(name)
        node.meta["type"] = Type(tuple(value.shape), value.dtype)
        return node

    def call(
        self,
        target: Any,
        *args: Any,
        to: Sequence[int | str],
        dtype: torch.dtype = torch.float32,
        **kwargs: Any,
    ) -> fx.Node:
        """A call giving a tensor of shape `to`."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta["type"] = Type(tuple(to), dtype)
        return node

    def size(self, of: fx.Node, dim: int) -> fx.Node:
        """A dynamic size, as a number."""
        node = self.graph.call_function(aten.sym_size.int, (of, dim))
        node.meta["type"] = None
        return node

    def done(self, **outputs: fx.Node) -> Program:
        """The finished program."""
        self.graph.output(tuple(outputs.values()))
        program = Program(self.graph, self.tensors, tuple(self.inputs), tuple(outputs))
        program.verify()
        return program


def tiny_llama(
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    mlp: int = 96,
    vocabulary: int = 80,
    bias: bool = False,
    tied: bool = True,
    qk_norm: bool = False,
    window: int = -1,
    softcap: float = 0.0,
    sinks: bool = False,
    rotary: int | None = None,
    seed: int = 0,
) -> Program:
    """A llama-like decoder: rotary positions, grouped heads, gated MLP; options add what its relatives do."""
    sk = Sketch(seed)
    rotary = head_dim if rotary is None else rotary
    ids = sk.input("input_ids", BS, torch.int64)
    mask = sk.input("attention_mask", BS, torch.int64, "ones")
    positions = sk.input("position_ids", BS, torch.int64, "positions")
    batch, sequence = sk.size(ids, 0), sk.size(ids, 1)

    embedding = "model.embed_tokens.weight"
    x = sk.call(aten.embedding.default, sk.parameter(embedding, vocabulary, hidden), ids, to=(*BS, hidden))
    cos, sin = _angles(sk, positions, rotary)

    def linear(value: fx.Node, name: str, rows: int, columns: int, biased: bool = False) -> fx.Node:
        args = [value, sk.parameter(f"{name}.weight", rows, columns)]
        if biased:
            args.append(sk.parameter(f"{name}.bias", rows, spread=0.1))
        return sk.call(aten.linear.default, *args, to=(*BS, rows))

    def norm(value: fx.Node, name: str, width: int, shape: Sequence[int | str]) -> fx.Node:
        weight = sk.parameter(f"{name}.weight", width, spread=0.1, around=1.0)
        return sk.call(aten.rms_norm.default, value, [width], weight, 1e-5, to=shape)

    def split_heads(value: fx.Node, count: int, normed: str) -> fx.Node:
        value = sk.call(aten.view.default, value, [batch, sequence, count, head_dim], to=(*BS, count, head_dim))
        if normed:
            value = norm(value, normed, head_dim, (*BS, count, head_dim))
        return sk.call(aten.transpose.int, value, 1, 2, to=("batch", count, "sequence", head_dim))

    for i in range(layers):
        at = f"model.layers.{i}"
        h = norm(x, f"{at}.input_layernorm", hidden, (*BS, hidden))
        wide = {"q": heads, "k": kv_heads, "v": kv_heads}
        q, k, v = (linear(h, f"{at}.self_attn.{n}_proj", c * head_dim, hidden, bias) for n, c in wide.items())
        q = split_heads(q, heads, f"{at}.self_attn.q_norm" if qk_norm else "")
        k = split_heads(k, kv_heads, f"{at}.self_attn.k_norm" if qk_norm else "")
        v = split_heads(v, kv_heads, "")
        q = sk.call(qc.rope, q, cos, sin, to=q.meta["type"].shape)
        k = sk.call(qc.rope, k, cos, sin, to=k.meta["type"].shape)
        sink = sk.parameter(f"{at}.self_attn.sinks", heads, spread=1.0) if sinks else None
        how = {"scale": default_scale(head_dim), "left": window, "right": 0, "softcap": softcap}
        shape = ("batch", heads, "sequence", head_dim)
        y = sk.call(qc.attention, q, k, v, None, mask, None, sink, to=shape, **how)
        y = sk.call(aten.transpose.int, y, 1, 2, to=(*BS, heads, head_dim))
        y = sk.call(aten.reshape.default, y, [batch, sequence, heads * head_dim], to=(*BS, heads * head_dim))
        y = linear(y, f"{at}.self_attn.o_proj", hidden, heads * head_dim)
        x = sk.call(aten.add.Tensor, x, y, to=(*BS, hidden))
        h = norm(x, f"{at}.post_attention_layernorm", hidden, (*BS, hidden))
        gate, up = linear(h, f"{at}.mlp.gate_proj", mlp, hidden), linear(h, f"{at}.mlp.up_proj", mlp, hidden)
        gate = sk.call(aten.silu.default, gate, to=(*BS, mlp))
        h = sk.call(aten.mul.Tensor, gate, up, to=(*BS, mlp))
        x = sk.call(aten.add.Tensor, x, linear(h, f"{at}.mlp.down_proj", hidden, mlp), to=(*BS, hidden))
    x = norm(x, "model.norm", hidden, (*BS, hidden))
    head = embedding if tied else "lm_head.weight"
    logits = sk.call(aten.linear.default, x, sk.parameter(head, vocabulary, hidden), to=(*BS, vocabulary))
    return sk.done(logits=logits)


def _angles(sk: Sketch, positions: fx.Node, rotary: int) -> tuple[fx.Node, fx.Node]:
    """Cosine and sine [batch, sequence, rotary / 2] of the rotary angles."""
    frequencies = sk.constant("model.rotary_emb.inv_freq", 100.0 ** (-torch.arange(0, rotary, 2) / rotary))
    real = sk.call(aten._to_copy.default, positions, to=BS, dtype=torch.float32)
    real.kwargs = {"dtype": torch.float32}
    column = sk.call(aten.unsqueeze.default, real, -1, to=(*BS, 1))
    angles = sk.call(aten.mul.Tensor, column, frequencies, to=(*BS, rotary // 2))
    cos = sk.call(aten.cos.default, angles, to=(*BS, rotary // 2))
    return cos, sk.call(aten.sin.default, angles, to=(*BS, rotary // 2))


def tiny_encoder(hidden: int = 32, heads: int = 4, vocabulary: int = 50, seed: int = 0) -> Program:
    """A BERT-like layer: learned positions, padding mask, layer norm, GELU."""
    sk, width = Sketch(seed), hidden // heads
    ids = sk.input("input_ids", BS, torch.int64)
    mask = sk.input("attention_mask", BS, torch.int64, "ones")
    batch, sequence = sk.size(ids, 0), sk.size(ids, 1)
    shape = (*BS, hidden)

    def linear(value: fx.Node, name: str, rows: int, columns: int) -> fx.Node:
        weight, offset = (
            sk.parameter(f"{name}.weight", rows, columns),
            sk.parameter(f"{name}.bias", rows, spread=0.1),
        )
        return sk.call(aten.linear.default, value, weight, offset, to=(*BS, rows))

    def norm(value: fx.Node, name: str) -> fx.Node:
        weight = sk.parameter(f"{name}.weight", hidden, spread=0.1, around=1.0)
        return sk.call(
            aten.layer_norm.default,
            value,
            [hidden],
            weight,
            sk.parameter(f"{name}.bias", hidden),
            1e-12,
            to=shape,
        )

    words = sk.call(aten.embedding.default, sk.parameter("words.weight", vocabulary, hidden, spread=1.0), ids, to=shape)
    places = sk.call(aten.arange.default, sequence, to=("sequence",), dtype=torch.int64)
    placed = sk.call(
        aten.embedding.default,
        sk.parameter("places.weight", 64, hidden, spread=1.0),
        places,
        to=("sequence", hidden),
    )
    x = norm(sk.call(aten.add.Tensor, words, placed, to=shape), "embeddings.norm")
    parts = []
    for name in "qkv":
        part = linear(x, f"attention.{name}", hidden, hidden)
        part = sk.call(aten.view.default, part, [batch, sequence, heads, width], to=(*BS, heads, width))
        parts.append(sk.call(aten.transpose.int, part, 1, 2, to=("batch", heads, "sequence", width)))
    y = sk.call(qc.attention, *parts, None, mask, to=("batch", heads, "sequence", width), scale=default_scale(width))
    y = sk.call(aten.transpose.int, y, 1, 2, to=(*BS, heads, width))
    y = sk.call(aten.reshape.default, y, [batch, sequence, hidden], to=shape)
    x = norm(sk.call(aten.add.Tensor, linear(y, "attention.o", hidden, hidden), x, to=shape), "attention.norm")
    h = sk.call(aten.gelu.default, linear(x, "mlp.up", 4 * hidden, hidden), to=(*BS, 4 * hidden))
    x = norm(sk.call(aten.add.Tensor, linear(h, "mlp.down", hidden, 4 * hidden), x, to=shape), "mlp.norm")
    halves = sk.call(aten.chunk.default, x, 2, -1, to=(*BS, hidden // 2))
    halves.meta["type"] = (Type((*BS, hidden // 2), torch.float32),) * 2
    first = sk.call(operator.getitem, halves, 0, to=(*BS, hidden // 2))
    return sk.done(last_hidden_state=x, first_half=first)


def located(program: Program) -> Program:
    """The same program, its nodes told which module they come from, as captured ones are."""
    path = ""
    for node in program.calls():
        weights = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
        path = weights[0].rpartition(".")[0] if weights else path
        node.meta["path"] = "lm_head" if "logits" in program.outputs and not _later_linear(program, node) else path
    return program


def _later_linear(program: Program, node: fx.Node) -> bool:
    """Whether a linear layer follows: the last one is the head."""
    last = program.linears()[-1]
    order = list(program.graph.nodes)
    return order.index(node) < order.index(last)


WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "far", "away", "from", "home", "to", "sea"]


def tiny_folder(folder: Path, layers: int = 2) -> Path:
    """A model folder as transformers writes it: a random llama, and a tokenizer of sixteen words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder
