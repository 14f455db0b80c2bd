"""A run on disk as an object: its results and curves, its report, its model to ask, compare, export and load."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from peft import PeftModel

from vlm_sft.api.models import Answers, answered, model_of, pairs_of
from vlm_sft.api.process_state import restored
from vlm_sft.api.views import Comparison, LossCurve, ReportPage, Results
from vlm_sft.common import artifacts
from vlm_sft.common.errors import RunError
from vlm_sft.common.idle import given_names, refuse_idle
from vlm_sft.evaluate.compare import compare_runs
from vlm_sft.evaluate.interactive import Asker, open_asker
from vlm_sft.export.request import IDLE, ExportOptions
from vlm_sft.export.run import export
from vlm_sft.report.collect import collect_runs
from vlm_sft.report.html import write_report
from vlm_sft.report.markdown import results_table
from vlm_sft.train.resume_check import IDLE as VERIFY_IDLE
from vlm_sft.train.resume_check import TRIAL_STEPS, Verification
from vlm_sft.train.resume_check import verify as verify_run


class Run:
    """One training run in its folder.

    Args:
        folder: the run's folder; it is read anew at each call, so a run that goes on can be looked at too.

    Attributes:
        folder: the same.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        shown = results_table(self.results.values) if (self.folder / artifacts.RESULTS).is_file() else "no results"
        return f"run {self.folder} ({self.status})\n{shown}"

    def _repr_html_(self) -> str:
        """The results for a notebook."""
        from html import escape

        table = self.results._repr_html_() if (self.folder / artifacts.RESULTS).is_file() else "<p>no results</p>"
        return f"<p>run <code>{escape(str(self.folder))}</code> ({escape(self.status)})</p>{table}"

    @property
    def record(self) -> dict[str, Any]:
        """The content of run.json: what ran, where, with which versions, in how many seconds and bytes."""
        return artifacts.read_json(self.folder / artifacts.RUN)

    @property
    def status(self) -> str:
        """How the run ended: "finished", "failed" or "interrupted"; "running" before that."""
        return str(self.record.get("status", "unknown"))

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe, with every default."""
        return artifacts.read_json(self.folder / artifacts.RECIPE)

    @property
    def results(self) -> Results:
        """Base against tuned on each benchmark.

        Raises:
            RunError: the run has no results: it was not evaluated, or not finished.
        """
        path = self.folder / artifacts.RESULTS
        if not path.is_file():
            what = f"{path} does not exist: the run is {self.status}, or was not evaluated"
            raise RunError(what, "train without eval_benchmarks none, or evaluate it: vlm_sft.evaluate_model")
        return Results(artifacts.read_json(path))

    def metrics(self) -> list[dict[str, Any]]:
        """The log events of the training, oldest first: the lines of metrics.jsonl."""
        path = self.folder / artifacts.METRICS
        return list(artifacts.read_jsonl(path)) if path.is_file() else []

    def loss_curve(self) -> LossCurve:
        """Training and evaluation loss over the steps: a curve in a notebook, `.to_pandas()` elsewhere."""
        (report,) = collect_runs([self.folder])
        rows = [row for row in self.metrics() if "loss" in row or "eval_loss" in row]
        return LossCurve(rows, report.record.best if report.record else None)

    def report(self, output: str | Path | None = None) -> ReportPage:
        """Write the report again, and show it in a notebook.

        Args:
            output: the HTML file; report.html in the run's folder by default.
        """
        return ReportPage(write_report([self.folder], Path(output or self.folder / artifacts.REPORT)))

    @cached_property
    def asker(self) -> Asker:
        """The loaded model; it stays in memory as long as this object, or until `del run.asker`."""
        base_model, adapter = model_of(self.folder)
        with restored():
            return open_asker(base_model, adapter)

    def ask(self, images: Any, questions: str | Sequence[str]) -> Answers:
        """Ask the model and its base.

        Args:
            images: a picture (PIL, path, bytes, NumPy array of uint8), or as many pictures as there are questions; a
                list of pictures in the place of one shows them together.
            questions: one, or several; `<image>` in a question says where a picture stands, as in a plain record.

        Returns:
            A table of `question`, `base` and `tuned` (None where all weights were trained: there, `base` answers).

        Raises:
            DataError: an image cannot be read, or images and questions do not pair.
            ModelError: the adapter or its base cannot be opened.
        """
        pairs = pairs_of(images, questions)
        with restored():
            return answered(self.asker, pairs)

    def compare(self, other: Run | str | Path | None = None) -> Comparison:
        """Compare with another run on the questions that both answered; by default with this run's base.

        Args:
            other: the baseline: a run, or a folder of predictions.

        Raises:
            EvaluationError: there is nothing to compare, or the questions differ.
        """
        if other is None:
            return Comparison(compare_runs([self.folder]))
        return Comparison(compare_runs([Path(other), self.folder], Path(other)))

    def export(self, output_dir: str | Path, merge: bool = False, **options: Any) -> Path:
        """Export a merged model or an adapter folder for other programs; the export is reopened and compared.

        Args:
            output_dir: the new folder.
            merge: put the adapter into the weights of the base: a whole model.
            **options: further fields of `ExportOptions`: `dtype`, `questions`, `repository`, ….

        Returns:
            The new folder.

        Raises:
            VlmSftError: it cannot be exported, or does not answer as the adapter does.
        """
        with restored():
            made = ExportOptions(adapter=self.folder, output_dir=Path(output_dir), merge=merge, **options)
            refuse_idle(made, IDLE, given_names(options))
            return export(made)

    def load(self, device: str = "auto") -> tuple[Any, Any]:
        """The model and its processor as plain PEFT and transformers objects.

        Args:
            device: where the model goes; "auto": the first GPU, else the CPU.

        Returns:
            A `peft.PeftModel` (a plain transformers model where all weights were trained), and the processor.
        """
        import torch
        from transformers import AutoModelForImageTextToText

        from vlm_sft.data.prompt import PromptSettings
        from vlm_sft.model.load import find_base
        from vlm_sft.model.saved_adapter import base_of_adapter, require_fit

        name, adapter = model_of(self.folder)
        place = ("cuda:0" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        with restored():
            prompt = PromptSettings.find(adapter) if adapter else None
            base = find_base(base_of_adapter(adapter, name) if adapter else str(name), prompt=prompt)
            if adapter:
                require_fit(adapter, base)
            model: Any = AutoModelForImageTextToText.from_pretrained(
                base.path, dtype=base.dtype, trust_remote_code=False, use_safetensors=True
            )
            if adapter:
                model = PeftModel.from_pretrained(model, str(adapter), use_safetensors=True)
        return model.to(place).eval(), base.processor


def verify(
    run: Any, steps: int | None = None, output_dir: str | Path | None = None, checkpoints_only: bool = False
) -> Verification:
    """Check the checkpoints of a run, then train a few steps of it, kill it, resume it, and compare bit for bit.

    Args:
        run: a `Run`, or its folder.
        steps: optimizer steps of the trial, at least 4; None for 6.
        output_dir: where the trial runs; None for `verify` in the run's folder.
        checkpoints_only: compare checksums, and train nothing: all that can be done with a run that Python began, since
            the trial repeats a command line.

    Returns:
        What was found: `exact`, `damaged`, `folder`; true where all is as it should be.

    Raises:
        RunError: the folder is no run, the trial does not run, or an option would have no effect.

    Examples:
        >>> import vlm_sft
        >>> vlm_sft.verify("outputs/none", checkpoints_only=True)
        Traceback (most recent call last):
        vlm_sft.common.errors.RunError: outputs/none holds no run.json
          fix: pass the output folder of a training
    """
    given = given_names({"steps": steps, "output_dir": output_dir})
    refuse_idle(SimpleNamespace(checkpoints_only=checkpoints_only), VERIFY_IDLE, given)
    place = Path(output_dir) if output_dir is not None else None
    return verify_run(Path(run), TRIAL_STEPS if steps is None else steps, place, checkpoints_only)


def open_run(folder: str | Path) -> Run:
    """Open a run, finished or still running.

    Args:
        folder: its output folder.

    Raises:
        RunError: the folder holds no run.

    Examples:
        >>> import vlm_sft
        >>> vlm_sft.open_run("outputs/none")
        Traceback (most recent call last):
        vlm_sft.common.errors.RunError: outputs/none does not exist
          fix: pass the --output_dir of a training run: a folder with run.json
    """
    collect_runs([Path(folder)])
    return Run(folder)
