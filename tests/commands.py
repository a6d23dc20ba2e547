"""Options of `bp-torch fit` that tests share."""

FIT_ALONE = [
    *("--trainer.enable_progress_bar", "false"),
    *("--trainer.enable_model_summary", "false"),
    *("--trainer.logger", "false"),
    *("--baselines", "false"),
    *("--report", "false"),
]
"""Nothing beside the fit: no display, no log, no baselines, no report."""
