"""Training: losses, terms and gradient norms along the runs."""

from functools import partial

from reports.figures.curves import gradient_curves, training_curves
from reports.figures.lines import bands_remark, panels_figure, stops_remark
from reports.figures.plans import Plan
from reports.sections import Part, Section
from reports.study.load import Study


def section(study: Study) -> Section | None:
    """The curves of training, then the gradient norms of each term; None where neither was recorded."""
    losses, gradients = _losses_plans(study), _gradients_plans(study)
    if not losses and not gradients:
        return None
    parts = [Part(title="Gradient norms by term", plans=gradients)] if gradients else []
    return Section(name="training", title="Training", plans=losses, parts=parts)


def _losses_plans(study: Study) -> list[Plan]:
    frame = training_curves(study)
    if frame.empty:
        return []
    caption = "Means over the steps between two logged points; terms before their weights."
    if study.thinning > 1:
        caption += f" Of the logged points, 1 in {study.thinning} is shown, and the last."
    alt = f"Losses and gradient norm against {study.unit.words}"
    draw = partial(panels_figure, has_points=False)
    return [Plan("training", frame, draw, alt, caption + bands_remark(frame) + stops_remark(frame))]


def _gradients_plans(study: Study) -> list[Plan]:
    """Gradient norms by term, where runs have recorded them."""
    frame = gradient_curves(study)
    if frame.empty:
        return []
    caption = (
        "Norm of the backbone's gradient from the velocity loss alone and from each weighted term alone, before "
        "clipping, on a batch at each evaluation. Thick lines are means, thin ones single seeds."
    )
    alt = f"Gradient norms by term against {study.unit.words}"
    return [Plan("gradients", frame, panels_figure, alt, caption + bands_remark(frame) + stops_remark(frame))]
