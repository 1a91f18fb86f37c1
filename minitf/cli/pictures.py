"""Pictures, by matplotlib if it is installed: their files, and reports of inspection.py."""
import numpy as np

from ..errors import require
from ..theory.kernels import correlation
from ..training.checkpoint import write

COLUMNS = ("mean square", "mean cosine", "effective rank", "gradient norm", "gradient cosine")


def blank(size):
    """A figure to be saved, empty yet; ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a picture needs matplotlib: pip install matplotlib") from None
    return Figure(figsize=size, layout="constrained")


def figure(size, *shape, **how):
    """A figure to be saved, and its axes; ValueError without matplotlib."""
    picture = blank(size)
    return picture, picture.subplots(*shape, **how)


def require_place(path):
    """ValueError where no picture can be written, before work is done for it."""
    blank((1, 1))
    require(path.suffix in (".png", ".pdf", ".svg") and path.absolute().parent.is_dir(),
            f"cannot write {path}: it must be a .png, .pdf or .svg in a folder that there is")


def save(picture, path):
    """Writes a figure: whole, or the old one stays."""
    write(path, lambda file: picture.savefig(file, dpi=110, format=path.suffix[1:]))


def plain_numbers(axis):
    """The ticks of a logarithmic axis as 20, not as 2 x 10^1."""
    from matplotlib.ticker import LogFormatter
    for ticks in (axis.set_major_formatter, axis.set_minor_formatter):
        formatter = LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5))
        formatter._num_to_string = lambda x, *limits: f"{x:g}"
        ticks(formatter)


def draw_reports(reports, path):
    """A row of kernels of the first window for each report, at four depths; COLUMNS over depth.

    reports: {label: what `inspection.measured` returns, and predictions}. What is predicted stands
    on the left.
    """
    kinds = [kind for kind in ("predicted kernels", "kernels")
             if any(kind in out for out in reports.values())]
    picture = blank((1.5 * 4 * len(kinds) + 1.5, 1.5 * len(reports) + 4))
    above, below = picture.subfigures(2, 1, height_ratios=(1.5 * len(reports), 3.6))
    grid = above.subplots(len(reports), 4 * len(kinds), squeeze=False)
    for row, ((label, out), line) in enumerate(zip(reports.items(), grid)):
        depths = np.linspace(0, len(out["kernels"]) - 1, 4).round().astype(int)
        for number, axis in enumerate(line):
            kind, depth = kinds[number // 4], depths[number % 4]
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(kind in out)
            if kind in out:
                image = axis.imshow(correlation(out[kind][depth]), cmap="gray_r", vmin=0, vmax=1)
            if row == 0:
                said = "predicted" if kind.startswith("predicted") else "measured"
                axis.set_title(f"{said}\nblock {depth}", fontsize="medium")
        line[0].set_ylabel(label, fontsize="small")
    above.colorbar(image, ax=grid, label="cosine of two positions", shrink=0.8)
    draw_columns(below, below.subplots(1, len(COLUMNS) - 1), COLUMNS, reports)
    save(picture, path)


def draw_columns(picture, axes, columns, reports):
    """A column of all reports on each axis, over depth: lines; what is predicted: circles.

    Lines that others cover are wider than these.
    """
    for axis, name in zip(axes, columns):
        for number, (label, out) in enumerate(reports.items()):
            style = dict(color=f"C{number - 1}" if number else "k")
            axis.plot(out[name], "-", label=label, lw=1 + 0.4 * (len(reports) - number), **style)
            if "predicted " + name in out:
                axis.plot(out["predicted " + name], "o", mfc="none", ms=5, **style)
        axis.plot([], [], "ko", mfc="none", ms=5, label="predicted")
        axis.set(xlabel="block", ylabel=name, yscale="linear" if "cosine" in name else "log")
        axis.xaxis.get_major_locator().set_params(integer=True)
        if "cosine" not in name:
            plain_numbers(axis.yaxis)
    picture.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8,
                   fontsize="small")
