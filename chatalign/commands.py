"""The commands. Light: each imports what it needs when it runs, so ``--help`` answers at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from chatalign.cli import print_schema

app = typer.Typer(
    name="chatalign",
    help="From a pretrained language model to a chat assistant: SFT, reward models, DPO and PPO.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted keys, as train.learning_rate=1e-4.")
]
Force = Annotated[bool, typer.Option("--force", help="Run again even where the same run is finished.")]
AllowChange = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY", help="Go on with an unfinished run although KEY changed; several with commas."),
]
Trace = Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")]
ModelRef = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, adapter folder, model folder or Hub id.")]


def _end(work: Callable[[], None], traceback: bool = False) -> None:
    from chatalign.launch import guarded, quiet_libraries

    quiet_libraries()
    raise typer.Exit(guarded(work, show_traceback=traceback))


def _add_stage(stage: str, what: str) -> None:
    def command(
        recipe: RecipePath,
        overrides: Overrides = None,
        force: Force = False,
        allow_change: AllowChange = None,
        traceback: Trace = False,
    ) -> None:
        from chatalign.launch import stage_main

        flags = ["--force"] * force + ["--traceback"] * traceback
        flags += [f"--allow-change={key}" for key in allow_change or []]
        stage_main(stage, argv=[recipe, *(overrides or []), *flags])

    app.command(stage, help=what)(command)


for _name, _what in {
    "pretrain": "Next-token training on plain text.",
    "sft": "Supervised fine-tuning on demonstrations.",
    "reward": "A reward model from preference pairs.",
    "dpo": "Direct preference optimisation.",
    "ppo": "PPO against a reward model or Python rewards.",
    "kto": "KTO on unpaired feedback, run by TRL.",
    "eval": "Measure models side by side.",
}.items():
    _add_stage(_name, _what)


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    force: Force = False,
    allow_change: AllowChange = None,
    accelerate_config: Annotated[
        str | None, typer.Option(help="Start each stage through accelerate with this configuration file.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Stages at once, each on a GPU of its own; as many as there are GPUs.")
    ] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(metavar="KEY=A,B", help="Run for each value, as in dpo.beta=0.05,0.1.")
    ] = None,
    traceback: Trace = False,
) -> None:
    """A chain of stages; what is fresh is skipped, what was killed goes on."""

    def work() -> None:
        from chatalign.engine.signals import breaking_off
        from chatalign.pipeline import run_pipeline
        from chatalign.recipe import parse_overrides

        changes = parse_overrides(overrides or [])
        how: dict[str, Any] = {"force": force, "allow_change": allow_change or [], "jobs": jobs}
        how["accelerate_config"] = accelerate_config
        with breaking_off():
            if sweep:
                from chatalign.sweep import parse_sweeps, run_sweep

                run_sweep(recipe, changes, parse_sweeps(sweep), **how)
            else:
                run_pipeline(recipe, changes, **how)

    _end(work, traceback)


@app.command()
def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")] = False,
    accelerate_config: Annotated[
        str | None, typer.Option(help="The file that `accelerate launch --config_file` will be given.")
    ] = None,
) -> None:
    """Everything that can be known before training; exit status 1 on a problem."""
    from chatalign.launch import quiet_libraries
    from chatalign.preflight import print_check

    quiet_libraries()
    raise typer.Exit(print_check(recipe, overrides or [], as_json=json, accelerate_config=accelerate_config))


@app.command()
def inspect(
    recipe: RecipePath,
    overrides: Overrides = None,
    rows: Annotated[int | None, typer.Option(min=1, help="How many rows to show: 3, on a page 20.")] = None,
    row: Annotated[int | None, typer.Option(help="Show this row only, counted from 1.")] = None,
    split: Annotated[Literal["train", "eval"], typer.Option(help="Rows to train or to evaluate on.")] = "train",
    stage: Annotated[str | None, typer.Option(help="Whose rows, of a pipeline: the first stage's that trains.")] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Show each token's bounds and id.")] = False,
    html: Annotated[str | None, typer.Option(metavar="PAGE", help="Write one HTML file instead.")] = None,
    traceback: Trace = False,
) -> None:
    """The rows as the model will see them, supervised tokens coloured."""

    def work() -> None:
        from chatalign.preflight import print_rows

        print_rows(recipe, overrides or [], rows=rows, row=row, split=split, stage=stage, tokens=tokens, html=html)

    _end(work, traceback)


@app.command()
def chat(
    model: ModelRef,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 0.95,
    max_new_tokens: Annotated[int, typer.Option(help="The longest reply, in tokens.")] = 512,
    seed: Annotated[int | None, typer.Option(help="For the same replies again.")] = None,
    traceback: Trace = False,
) -> None:
    """Talk to a model."""

    def work() -> None:
        from chatalign.chat import chat as talk

        talk(model, system=system, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed)

    _end(work, traceback)


@app.command()
def report(
    run_folder: Annotated[str, typer.Argument(metavar="RUN", help="A stage's or a pipeline's run folder.")],
    other: Annotated[str | None, typer.Argument(metavar="[OTHER]", help="Another one, to compare it with.")] = None,
    output: Annotated[str | None, typer.Option(help="Where a comparison goes; RUN-vs-OTHER beside RUN.")] = None,
    traceback: Trace = False,
) -> None:
    """Write a run's report again and draw what it came from, or compare two runs."""

    def work() -> None:
        from pathlib import Path

        from chatalign.summary import compare_runs, write_report

        if other is None:
            write_report(Path(run_folder))
        else:
            compare_runs(Path(run_folder), Path(other), output)

    _end(work, traceback)


@app.command()
def verify(
    run_folder: Annotated[str, typer.Argument(metavar="RUN", help="A stage's or a pipeline's run folder.")],
    traceback: Trace = False,
) -> None:
    """Hash everything that a run recorded again; exit status 1 where something no longer matches."""
    from chatalign.launch import guarded

    altered: list[str] = []

    def work() -> None:
        from chatalign.verify import verify_run

        for verdict in verify_run(run_folder):
            print(f"ok    {verdict.what}" if verdict.problem is None else f"FAIL  {verdict.problem}")
            altered.extend(filter(None, [verdict.problem]))

    raise typer.Exit(guarded(work, show_traceback=traceback) or int(bool(altered)))


@app.command()
def merge(
    model: ModelRef,
    output: Annotated[str, typer.Argument(metavar="FOLDER", help="Where the merged model goes.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "auto",
    traceback: Trace = False,
) -> None:
    """Fold an adapter into its base model."""

    def work() -> None:
        from chatalign.merge import merge as fold

        print(fold(model, output, dtype=dtype))

    _end(work, traceback)


@app.command()
def push(
    run_folder: Annotated[
        str, typer.Argument(metavar="RUN", help="A finished run's folder; any above it (--pending).")
    ],
    repo: Annotated[str | None, typer.Option(help="The Hub repository, as me/my-assistant.")] = None,
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = True,
    pending: Annotated[
        bool, typer.Option("--pending", help="Upload what the Hub didn't take when it was made.")
    ] = False,
    traceback: Trace = False,
) -> None:
    """Upload a finished run's model, tokenizer and card to the Hub."""

    def work() -> None:
        from chatalign.errors import RecipeError
        from chatalign.hub import push as upload
        from chatalign.hub import push_pending

        if pending == (repo is not None):
            raise RecipeError("push: give either `--repo me/my-assistant` or `--pending`")
        for line in push_pending(run_folder) if repo is None else [upload(run_folder, repo, private=private)]:
            print(line, flush=True)

    _end(work, traceback)


@app.command()
def schema(
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="A stage's name, or pipeline.")] = "sft",
) -> None:
    """The JSON Schema of a recipe, for editors."""
    print_schema(stage)


@app.command()
def env() -> None:
    """Versions of chatalign and of what it stands on, for bug reports."""
    from chatalign.artifact import versions

    for name, version in versions().items():
        print(f"{name:14} {version}")
