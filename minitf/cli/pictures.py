"""Pictures, by matplotlib if it is installed: their files, and reports of inspection.py."""
import numpy as np

from ..theory.kernels import correlation


def figure(size, *shape, **how):
    """A figure to be saved, and its axes; ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a picture needs matplotlib: pip install matplotlib") from None
    picture = Figure(figsize=size, layout="constrained")
    return picture, picture.subplots(*shape, **how)


def save(picture, path, **how):
    """Writes a figure; ValueError where that is not possible."""
    try:
        picture.savefig(path, dpi=110, **how)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot write {path}: {error}") from None


def draw_reports(reports, columns, path):
    """Kernels of the first window at four depths, predicted ones first; columns over depth.

    reports: {label: what `inspection.measured` returns, and predictions}.
    """
    rows = {}
    for label, out in reports.items():
        if "predicted kernels" in out:
            rows[label.replace("measured", "predicted")] = out["predicted kernels"]
        rows[label] = out["kernels"]
    picture, axes = figure((12, 2.7 * len(rows) + 3), len(rows) + 1, len(columns) - 1)
    for (label, kernels), line in zip(rows.items(), axes):
        for axis, depth in zip(line, np.linspace(0, len(kernels) - 1, 4).round().astype(int)):
            image = draw_kernel(axis, kernels[depth], f"{label}, block {depth}")
    picture.colorbar(image, ax=axes[:-1], label="cosine of two positions' activations", shrink=0.6)
    draw_columns(axes[-1], columns, reports)
    axes[-1][1].legend(fontsize="small")
    save(picture, path)


def draw_columns(axes, columns, reports):
    """A column of all reports on each axis, over depth: lines; what is predicted: circles."""
    styles = "k-", "k:", *(f"C{number}-" for number in range(10))
    for axis, name in zip(axes, columns):
        for (label, out), style in zip(reports.items(), styles):
            line, = axis.plot(out[name], style, label=label)
            if "predicted " + name in out:
                axis.plot(out["predicted " + name], "o", color=line.get_color(), mfc="none", ms=4,
                          label=label.replace("measured", "predicted"))
        axis.set(xlabel="block", ylabel=name, yscale="linear" if "cosine" in name else "log")


def draw_kernel(axis, kernel, title):
    """The cosines of a kernel (T, T), white for 0, black for 1; returns the image."""
    axis.set(title=title, xlabel="position", ylabel="position")
    return axis.imshow(correlation(np.asarray(kernel, float)), cmap="gray_r", vmin=0, vmax=1)
