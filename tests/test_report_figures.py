"""Figures of many runs: what is drawn, with which units, and that nothing else is."""

from pathlib import Path
from typing import Any

import pytest

from cola.report.curve_figures import interval_figures, learning_curves
from cola.report.finding import find
from cola.report.matching import match_runs
from cola.report.score_figures import MAX_USERS, memory_figures, user_figures
from cola.report.style import CYCLE, HATCHES, INK, cycle_styles, method_styles
from tests.reports import COLA, write_run


def axes_of(figure: Any) -> Any:
    (axes,) = figure.figure.axes
    return axes


def legend_of(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.figure.legends[0].get_texts()]


def test_a_curve_is_the_mean_over_seeds_with_a_band(tmp_path: Path) -> None:
    for seed, value in enumerate((0.4, 0.6)):
        write_run(tmp_path, **COLA, seed=seed, points={10: value, 20: value + 0.1})
        write_run(tmp_path, seed=seed, points={10: 0.1, 20: 0.2})
    (figure,) = learning_curves(find([tmp_path]).runs)
    assert figure.title == "Learning curves: MNIST, linear"
    axes = axes_of(figure)
    assert (axes.get_xlabel(), axes.get_ylabel()) == (
        "step (batches)",
        "accuracy on the selection split, %",
    )
    assert legend_of(figure) == ["LoRA", "ColA low-rank"]  # in the paper's order
    lora, cola = axes.lines
    assert list(cola.get_ydata()) == pytest.approx([50, 60])
    assert list(lora.get_ydata()) == pytest.approx([10, 20])
    spread = axes.collections[1].get_paths()[0].vertices[:, 1]
    assert (spread.min(), spread.max()) == pytest.approx((50 - 14.142, 60 + 14.142), abs=0.01)


def test_runs_without_a_curve_are_not_drawn(tmp_path: Path) -> None:
    write_run(tmp_path, points={10: 0.5})
    assert learning_curves(find([tmp_path]).runs) == []


def test_other_settings_are_not_drawn_and_counted(tmp_path: Path) -> None:
    for seed, rate in ((0, 0.1), (1, 0.1), (0, 0.3)):
        settings = {"optimizer.lr": rate}
        write_run(tmp_path, seed=seed, points={1: 0.1, 2: 0.2}, settings=settings)
    (figure,) = learning_curves(find([tmp_path]).runs)
    assert "Runs with other settings are not drawn: 1" in figure.caption


def write_ablation(outputs: Path, interval: int, **changes: Any) -> None:
    settings = {"trainer.interval": interval, "trainer.batch_size": 64}
    settings |= changes.pop("settings", {"experiment_name": "figure10"})
    write_run(outputs, **COLA, value=1 / (1 + interval), settings=settings, **changes)


def drawn_intervals(outputs: Path) -> list[Any]:
    runs = find([outputs]).runs
    matches = match_runs(runs)
    matched = [match.run for match in matches]
    return interval_figures(matches, [run for run in runs if run not in matched])


def test_the_ablation_draws_a_line_for_each_model(tmp_path: Path) -> None:
    for model in ("linear", "mlp"):
        for interval in (1, 2, 4):
            write_ablation(tmp_path, interval, model=model)
    (figure,) = drawn_intervals(tmp_path)
    assert (figure.name, figure.title) == ("figure10", "Figure 10: adaptation interval")
    axes = axes_of(figure)
    assert [list(line.get_xdata()) for line in axes.lines] == [[1, 2, 4], [1, 2, 4]]
    assert list(axes.lines[0].get_ydata()) == pytest.approx([50, 33.33, 20], abs=0.01)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "4"]
    assert "batches per adaptation" in axes.get_xlabel()


def test_a_rehearsed_ablation_says_so(tmp_path: Path) -> None:
    settings = {"experiment_name": "figure9"}
    for interval in (1, 2):
        write_ablation(tmp_path, interval, task="dolly", model="tiny-gpt2", settings=settings)
    (figure,) = drawn_intervals(tmp_path)
    assert figure.title == "Figure 9: adaptation interval (STAND-IN: tiny-gpt2 for gpt2)"


def test_other_runs_share_a_figure(tmp_path: Path) -> None:
    for interval in (1, 2):
        write_ablation(tmp_path, interval, task="digits", settings={})
    (figure,) = drawn_intervals(tmp_path)
    assert figure.name == "intervals"


def test_one_interval_is_no_ablation(tmp_path: Path) -> None:
    write_ablation(tmp_path, 2)
    assert drawn_intervals(tmp_path) == []


def test_each_method_is_a_point_of_score_and_base_memory(tmp_path: Path) -> None:
    gpu = {"cpu": 900.0, "cuda:0": 500.0, "cuda:1": 700.0}
    write_run(tmp_path, value=0.5, peak_mib={"cuda:0": 600.0}, settings={"device": "cuda:0"})
    write_run(tmp_path, **COLA | {"offload": "gpu"}, value=0.6, peak_mib=gpu)
    (figure,) = memory_figures(find([tmp_path]).runs)
    points = [line.get_xydata()[0].tolist() for line in axes_of(figure).lines]
    assert sorted(points) == [[500.0, 60.0], [600.0, 50.0]]
    assert "ColA low-rank, fits on gpu" in legend_of(figure)
    assert axes_of(figure).get_xlabel() == "peak memory of the base device while training, MiB"


def test_memory_on_the_cpu_is_everything_that_is_held_there(tmp_path: Path) -> None:
    write_run(tmp_path)
    write_run(tmp_path, **COLA)
    (figure,) = memory_figures(find([tmp_path]).runs)
    assert axes_of(figure).get_xlabel().startswith("held on the CPU: base model, adapters")


def test_a_single_method_has_no_trade_off_to_show(tmp_path: Path) -> None:
    write_run(tmp_path)
    assert memory_figures(find([tmp_path]).runs) == []


def test_users_are_bars_side_by_side(tmp_path: Path) -> None:
    for users, value in (("joint", 0.2), ("alone", 0.4)):
        scores = {f"u{i}": {"accuracy": value + i / 100} for i in range(MAX_USERS + 1)}
        write_run(tmp_path, **COLA, users=users, by_user=scores)
    (figure,) = user_figures(find([tmp_path]).runs)
    axes = axes_of(figure)
    assert legend_of(figure) == ["joint: ColA low-rank", "alone: ColA low-rank"]
    assert len(axes.patches) == 2 * MAX_USERS
    assert axes.patches[1].get_height() == pytest.approx(21)
    assert axes.patches[0].get_hatch() != axes.patches[MAX_USERS].get_hatch()


def test_methods_differ_without_colour_too() -> None:
    names = ["ColA low-rank", "ColA low-rank, merged", "LoRA", "FT", "mine"]
    styles = method_styles(names)
    assert len({(style.marker, style.is_hollow) for style in styles.values()}) == len(names)
    assert styles["FT"].colour == INK
    assert len({style.marker for style in cycle_styles([str(i) for i in range(8)]).values()}) == 8
    pairs = {(CYCLE[i % len(CYCLE)], HATCHES[i % len(HATCHES)]) for i in range(40)}
    assert len(pairs) == 40
