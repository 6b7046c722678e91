"""What a run shows: pictures that hold what was measured, and bars with loss, speed and time left."""

import io

import pytest
from rich.console import Console

from attnconv.distill.metrics import Record
from attnconv.distill.plots import plot_layers, plot_losses
from attnconv.distill.progress import Silent, TerminalProgress


def record(index, stage, step, loss):
    return Record(index, stage, step, step * 512, loss, 1e-3, 1.0, 240.0, {})


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, before they were."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig

    def kept(figure, *args, **kwargs):
        figures.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", kept)
    return figures


def test_each_stage_has_a_panel_with_its_units(tmp_path, drawn):
    transfer = [record(0, "attention_transfer", step, 100 / step) for step in (1, 2, 50)]
    lora = [record(1, "lora", step, 3.5 - step / 1000) for step in (10, 20)]
    plot_losses([*transfer, *lora], tmp_path / "losses.png")
    first, second = drawn[0].axes
    assert (first.get_yscale(), second.get_yscale()) == ("log", "linear")
    assert first.lines[0].get_xdata().tolist() == [512, 1024, 25600]
    assert "nats per token" in second.get_ylabel()
    assert first.get_xlabel() == "training tokens"
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("losses", [[0.0, 0.0], [1.0], [1e-9, 1e9]])
def test_odd_losses_can_be_drawn(tmp_path, losses):
    plot_losses([record(0, "logits", step, loss) for step, loss in enumerate(losses)], tmp_path / "a.png")


def test_layers_are_drawn_for_each_moment(tmp_path, drawn):
    plot_layers({"after swap": {"a": 0.5, "b": 3.0}, "after lora": {"a": 0.01, "b": 0.2}}, tmp_path / "layers.png")
    (panel,) = drawn[0].axes
    assert panel.get_yscale() == "log"
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["after swap", "after lora"]
    assert panel.get_ylim()[1] > 3


def test_bars_show_loss_speed_and_time():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120)
    with TerminalProgress(console) as progress:
        progress.phase("Loading the model")
        progress.begin("Stage 1: lora", 10, 4)
        for _ in range(6):
            progress.step(2.3456, 1234.5)
        progress.end()
        progress.end()
        progress.begin("Stage 2: features", 1, 0, "images")
        progress.step(2.0, 0.54)
        progress.end()
    shown = stream.getvalue()
    for expected in ("Loading the model", "Stage 1: lora", "10/10", "loss 2.346", "1,234 tokens/s", "0.5 images/s"):
        assert expected in shown, expected


@pytest.mark.parametrize("width", [80, 110, 160])
def test_no_figure_is_cut_however_narrow_the_terminal_is(width):
    stream = io.StringIO()
    with TerminalProgress(Console(file=stream, force_terminal=True, color_system=None, width=width)) as progress:
        progress.phase("Measuring perplexity: attention_transfer, without the window path")
        progress.begin("Stage 1: attention_transfer", 1200, 1100)
        progress.step(0.03349, 19330)
    shown = stream.getvalue()
    for expected in ("1/1", "path", "Stage 1: attention_transfer", "1101/1200", "loss 0.03349  19,330 tokens/s", "0:0"):
        assert expected in shown, expected
    assert "…" not in shown


def test_silence_is_silent(capsys):
    progress = Silent()
    progress.phase("a")
    progress.begin("b", 2, 0)
    progress.step(1.0, 2.0)
    progress.end()
    assert capsys.readouterr() == ("", "")
