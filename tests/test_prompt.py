"""Prompts read in integers: the second form of a program, beside the one that decodes."""

import operator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

import qcompiler
from qcompiler.backends.onnxruntime import OnnxRuntime, buffers, reader
from qcompiler.backends.onnxruntime.buffers import LONG
from qcompiler.backends.onnxruntime.prompt import _apart, cut, prompt_form
from qcompiler.data import check_samples
from qcompiler.errors import RecipeError
from qcompiler.ops import qc
from qcompiler.passes.rtn import Rtn
from qcompiler.pipeline import Context, Runner
from qcompiler.program import Program, Type
from qcompiler.recipe import Recipe, build_backend
from qcompiler.scheme import Scheme
from tests.programs import tiny_encoder, tiny_folder, tiny_llama
from tests.test_padding import decoder_program

aten = torch.ops.aten
BACKEND = OnnxRuntime(accuracy_level=0, threads=1, integer_prompt=True)
COUNT = LONG + 8
IDS = torch.randint(0, 80, (3, COUNT), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def program() -> Program:
    made = decoder_program()
    Rtn(Scheme.parse("int4:g32")).run(made, Context())
    made.clean()
    return made


def coded(cache: str = "int8:channel:sym", layers: int = 2) -> Program:
    """A decoder of 4 bits whose cache holds codes."""
    made = tiny_llama(layers=layers)
    recipe = f"rtn{{scheme=int4:g32}}, kv{{key={cache} value={cache}}}, fuse, kv_cache"
    samples = [{"input_ids": torch.randint(0, 80, (8, 24), generator=torch.Generator().manual_seed(6))}]
    Runner(Context(samples=samples), check_samples(made)).run(made, Recipe.parse(recipe).passes)
    return made


def by_meaning(program: Program, ids: Tensor) -> Tensor:
    """The logits behind a prompt: all but its last token by the second form, that one by the first."""
    caches = prompt_form(program)(input_ids=ids[:, :-1])
    past = {name: caches[present] for name, present in program.info["caches"].items()}
    return program(input_ids=ids[:, -1:], **past)["logits"][:, -1]


def test_the_form_for_prompts_fills_caches_in_integers(program: Program) -> None:
    form = prompt_form(program)
    assert set(form.outputs) == set(program.info["caches"].values())
    assert not list(form.calls(qc.linear))
    # Of the last layer only keys and values are wanted: neither its output, nor its feed-forward part, nor the head.
    # The first's gate and up, one layer in the program, are two.
    assert len(list(form.calls(qc.integer_linear))) == len(list(program.calls(qc.linear))) - 4 + 1
    exact, rounded = program(input_ids=IDS), form(input_ids=IDS)
    for name in form.outputs:
        error = (rounded[name] - exact[name]).norm() / exact[name].norm()
        assert 0 < float(error) < 0.03


def test_merged_layers_come_apart_but_before_attention(program: Program) -> None:
    def splits(of: Program) -> int:
        return len(list(of.calls(aten.split_with_sizes.default)))

    form = prompt_form(coded(layers=3))
    # Of each but the last of three layers gate and up; queries, keys and values go on side by side.
    assert (splits(coded(layers=3)), splits(form)) == (6, 3)
    widths = [node.meta["type"].shape[-1] for node in form.calls(qc.integer_linear)]
    merged = [node.meta["type"].shape[-1] for node in coded(layers=3).calls(qc.linear)]
    assert sum(widths) == sum(merged[:-4])  # no layer twice, none left out


def test_a_layer_whose_tokens_are_parted_stays_whole() -> None:
    graph = fx.Graph()
    layer = graph.call_function(qc.linear, (graph.placeholder("x"), []))
    layer.meta["type"] = Type(("batch", 6, 6), torch.float32)
    weight = torch.eye(6)
    split = graph.call_function(aten.split_with_sizes.default, (layer, [2, 4], 1))
    pieces = [graph.call_function(operator.getitem, (split, i)) for i in range(2)]
    assert _apart(layer, weight) == [(layer, weight)]
    split.args = (layer, [2, 4], -1)
    assert [(piece, len(rows)) for piece, rows in _apart(layer, weight)] == [(pieces[0], 2), (pieces[1], 4)]


def test_a_prompt_is_read_by_the_second_form(program: Program) -> None:
    runner = BACKEND.lower(program)
    found = runner.decoder(1, COUNT + 4).step(IDS[:1])
    torch.testing.assert_close(found, by_meaning(program, IDS[:1]), rtol=1e-4, atol=1e-4)
    first = OnnxRuntime(accuracy_level=0, threads=1).lower(program).decoder(1, COUNT).step(IDS[:1])
    assert not torch.allclose(found, first, rtol=1e-4, atol=1e-4)


def test_decoding_goes_on_behind_it_and_takes_more_prompt(program: Program) -> None:
    decoder = BACKEND.lower(program).decoder(1, 2 * COUNT + 1)
    decoder.step(IDS[:1])
    decoder.step(torch.tensor([[7]]))
    found = decoder.step(IDS[1:2])
    text = torch.cat([IDS[:1], torch.tensor([[7]]), IDS[1:2]], 1)
    expected = program(input_ids=text)["logits"][:, -1]
    assert float((found - expected).norm() / expected.norm()) < 0.03


def test_rows_of_a_padded_batch_are_what_they_are_alone(program: Program) -> None:
    runner = BACKEND.lower(program)
    pads = torch.tensor([0, 3, 7])
    mask = (torch.arange(COUNT) >= pads[:, None]).long()
    decoder = runner.decoder(3, COUNT + 2)
    found, then = decoder.step(IDS, mask), decoder.step(torch.tensor([[1], [2], [3]]))
    for row, pad in enumerate(pads.tolist()):
        alone = runner.decoder(1, COUNT + 2)
        torch.testing.assert_close(found[row], alone.step(IDS[row : row + 1, pad:])[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(then[row], alone.step(torch.tensor([[row + 1]]))[0], rtol=1e-4, atol=1e-4)


def test_short_prompts_are_read_by_the_first_form(program: Program) -> None:
    both, one = (OnnxRuntime(accuracy_level=0, threads=1, integer_prompt=on).lower(program) for on in (True, False))
    ids = IDS[:1, :LONG]
    assert torch.equal(both.decoder(1, LONG).step(ids), one.decoder(1, LONG).step(ids))


def test_a_saved_folder_keeps_it(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model")
    session = qcompiler.compile(model, "rtn-w4a16", backend="onnxruntime{integer_prompt=true threads=1}")
    session.save(tmp_path / "out")
    assert (tmp_path / "out" / "prompt.0.onnx.data").exists()
    ids = IDS[:1] % 16
    steps = [s.runner.decoder(1, COUNT).step(ids) for s in (session, qcompiler.load(tmp_path / "out"))]
    assert torch.equal(*steps)


def test_a_backends_options_can_be_texts() -> None:
    assert build_backend("onnxruntime{accuracy_level=0 threads=1 integer_prompt=yes}") == BACKEND
    with pytest.raises(RecipeError, match='backend "onnxruntime" has no option "thread"; did you mean "threads"'):
        build_backend("onnxruntime{thread=1}")
    with pytest.raises(RecipeError, match='option "threads" must be of type int, not "many"'):
        build_backend("onnxruntime{threads=many}")
    with pytest.raises(RecipeError, match=r"is not understood; write for example: onnxruntime\{threads=2\}"):
        build_backend("onnxruntime{")


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda: tiny_encoder(), "by programs that have a cache"),
        (lambda: decoder_program(), "where linear layers are quantized"),
        (lambda: decoder_program(head_dim=12), "where past and present share a buffer, which its attention cannot"),
    ],
    ids=["no cache", "floats", "no shared buffer"],
)
def test_programs_that_have_no_such_form_say_why(made: object, reason: str) -> None:
    refusals = BACKEND.lower(made()).refusals  # type: ignore[operator]
    assert any(reason in str(no) for no in refusals)


def test_without_a_cache_nothing_is_added(tmp_path: Path) -> None:
    BACKEND.lower(tiny_llama(), tmp_path)
    assert not (tmp_path / "prompt.0.onnx").exists()


def test_a_folder_without_it_is_lowered_again_when_it_is_asked_for(tmp_path: Path) -> None:
    qcompiler.compile(tiny_folder(tmp_path / "model"), "rtn-w4a16", backend="onnxruntime").save(tmp_path / "out")
    runner = qcompiler.load(tmp_path / "out", "onnxruntime{integer_prompt=true}").runner
    assert runner.reader is not None  # type: ignore[attr-defined]
    assert not (tmp_path / "out" / "prompt.0.onnx").exists()


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """Five blocks that know where they come from."""
    folder = tiny_folder(tmp_path_factory.mktemp("deep"), layers=5)
    program: Program = qcompiler.compile(
        folder, "canonicalize, rtn{scheme=int4:g32}, fuse, kv_cache", backend="onnxruntime"
    ).program
    return program


@pytest.mark.parametrize(("count", "blocks"), [(1, [5]), (2, [3, 2]), (4, [2, 2, 1]), (9, [1, 1, 1, 1, 1])])
def test_pieces_one_after_the_other_are_the_whole_form(deep: Program, count: int, blocks: list[int]) -> None:
    form, ids = prompt_form(deep), IDS % 16
    pieces = cut(form, count)
    assert [len(list(piece.calls(qc.cached_attention))) for piece in pieces] == blocks
    left: dict[str, Tensor] = {}
    for piece in pieces:
        piece.verify()
        names = {spec.name for spec in piece.inputs}
        left |= piece(input_ids=ids, **{name: value for name, value in left.items() if name in names})
    for name, expected in form(input_ids=ids).items():
        assert torch.equal(left[name], expected)
    linears = [len(list(piece.calls(qc.integer_linear))) for piece in pieces]
    assert sum(linears) == len(list(form.calls(qc.integer_linear)))


def test_a_program_that_knows_of_no_blocks_is_one_piece(program: Program) -> None:
    assert len(cut(prompt_form(program))) == 1


def test_a_piece_is_given_its_weights(deep: Program, tmp_path: Path) -> None:
    """They are no part of the session, which would pack them into memory of its own."""
    pieces = BACKEND.lower(deep, tmp_path).reader.pieces  # type: ignore[attr-defined]
    assert len(pieces) == 3
    given = sum(spec.type == "tensor(int8)" for piece in pieces for spec in piece.session.get_inputs())
    assert given == len(list(prompt_form(deep).calls(qc.integer_linear)))
    found = BACKEND.load(deep, tmp_path).decoder(1, COUNT).step(IDS[:1] % 16)
    expected = by_meaning(deep, IDS[:1] % 16)
    assert float((found - expected).norm() / expected.norm()) < 1e-2  # one code more or less here and there


@pytest.mark.parametrize("integers", [True, False])
def test_a_long_prompt_is_read_a_part_at_a_time(
    program: Program, integers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = OnnxRuntime(accuracy_level=0, threads=1, integer_prompt=integers)
    expected = backend.lower(program).decoder(1, COUNT).step(IDS[:1])
    for module in (buffers, reader):
        monkeypatch.setattr(module, "AT_ONCE", 9)
    decoder = backend.lower(program).decoder(1, 2 * COUNT)
    torch.testing.assert_close(decoder.step(IDS[:1]), expected, rtol=1e-4, atol=1e-4)
    text = torch.cat([IDS[:1], IDS[1:2]], 1)
    then = program(input_ids=text)["logits"][:, -1]
    found = decoder.step(IDS[1:2])  # behind a past, from parts again
    assert float((found - then).norm() / then.norm()) < 0.03
    padded, mask = torch.cat([IDS[:1, :3], IDS[:1]], 1), torch.ones(1, COUNT + 3, dtype=torch.int64)
    mask[:, :3] = 0
    torch.testing.assert_close(
        backend.lower(program).decoder(1, COUNT + 3).step(padded, mask), expected, rtol=1e-4, atol=1e-4
    )


def test_a_cache_of_codes_is_filled_with_what_the_form_found_rounded() -> None:
    program = coded(layers=3)
    decoder = BACKEND.lower(program).decoder(1, 2 * COUNT)
    found = decoder.step(IDS[:1])
    form = prompt_form(program)(input_ids=IDS[:1, :-1])
    for past, present in program.info["caches"].items():
        codes = decoder.caches[past]  # type: ignore[attr-defined]
        assert codes.dtype == torch.int8
        expected = (form[present] / form[f"{past}.scale"]).round().clamp(-128, 127)
        assert float((codes[:, :, : COUNT - 1].float() - expected).abs().max()) <= 1
    expected = program(input_ids=IDS[:1])["logits"][:, -1]
    assert float((found - expected).norm() / expected.norm()) < 0.03
    # Attention of the second form reads floats: behind codes the first one goes on.
    text = torch.cat([IDS[:1], IDS[1:2]], 1)
    expected = program(input_ids=text)["logits"][:, -1]
    assert float((decoder.step(IDS[1:2]) - expected).norm() / expected.norm()) < 0.03


def test_rows_of_a_padded_batch_fill_codes() -> None:
    runner = BACKEND.lower(coded())
    mask = (torch.arange(COUNT) >= torch.tensor([[0], [5]])).long()
    decoder = runner.decoder(2, COUNT + 1)
    found = decoder.step(IDS[:2], mask)
    for row, pad in enumerate((0, 5)):
        alone = runner.decoder(1, COUNT + 1).step(IDS[row : row + 1, pad:])[0]
        assert float((found[row] - alone).norm() / alone.norm()) < 0.01


def test_prompts_read_at_the_same_time(deep: Program) -> None:
    runner = BACKEND.lower(deep)

    def read(row: int) -> Tensor:
        return runner.decoder(1, COUNT).step(IDS[row : row + 1] % 16)

    expected = [read(row) for row in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for row, found in enumerate(pool.map(read, [0, 1, 2] * 5)):
            assert torch.equal(found, expected[row % 3])


def test_caches_of_four_bits_are_read_by_the_first_form() -> None:
    runner = BACKEND.lower(coded("int4:channel:sym"))
    assert any("into caches of floats or of 8 bits" in str(no) for no in runner.refusals)
    assert runner.reader is None  # type: ignore[attr-defined]
