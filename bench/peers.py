"""Install chatalign and each peer into virtual environments of their own: `python bench/peers.py [NAME ...]`.

An environment lies under bench/.venvs/NAME with `peer.json` (what was installed, or why not) and `install.log`. A peer
whose recipe below is unchanged is not installed again; `--again` does it anew.

The trap is torch: asked for plainly, or by torchvision, torchaudio or xformers, pip takes the newest build with several
gigabytes of CUDA libraries. So torch goes in first at the version of constraints.txt, every pip command is held to that
version, a peer's own requirements are read from its metadata without what drags another torch in, and an install that
nevertheless reaches for such a package is stopped.
"""

import argparse
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
VENVS = ROOT / "bench" / ".venvs"
CONSTRAINTS = ROOT / "constraints.txt"
TIME_LIMIT_S = 480

# torchdata, torchao and triton are left in: they take the torch that is there, or none.
TORCH_FAMILY = frozenset({"torch", "torchvision", "torchaudio", "torchcodec", "xformers"})
CUDA_PREFIXES = ("nvidia-", "cuda-", "cupy-")
VERSIONS_SHOWN = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")


class InstallError(RuntimeError):
    """A peer that did not install or does not import here; the message is one line."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """How one peer is installed, and the import that shows it can train on this machine.

    `checkout` is installed in the requirement's place, for its code to be run as it stands.
    `own_pins` are packages added at the versions of constraints.txt; else the peer's own requirement decides.
    `beside` is what it imports without naming it as a requirement. `stand_ins` are modules that it imports at its top
    and that have no build without CUDA: empty modules take their place, so that whatever would really call one fails.
    """

    requirement: str
    imports: str
    checkout: str | None = None
    own_pins: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    stand_ins: tuple[str, ...] = ()


PEERS: dict[str, Peer] = {
    # Without extras, as the peers are: what is installed (bitsandbytes, scikit-learn) transformers and peft import.
    "chatalign": Peer(
        requirement="chatalign",
        checkout=str(ROOT),
        imports="import chatalign.sft",
        own_pins=("transformers", "peft", "datasets", "accelerate"),
    ),
    "trl": Peer(
        requirement="trl==1.16.0",
        imports="from trl import DPOTrainer, RewardTrainer, SFTTrainer",
        own_pins=("transformers", "peft", "datasets", "accelerate"),
    ),
    # The last release with a PPOTrainer; its own requirements have no upper bound, and it runs beside today's packages.
    "trl-ppo": Peer(
        requirement="trl==1.12.0",
        imports="from trl.experimental.ppo import PPOConfig, PPOTrainer",
        own_pins=("transformers", "peft", "datasets", "accelerate"),
    ),
    "llamafactory": Peer(
        requirement="llamafactory==0.9.5",
        imports="from llamafactory.train.tuner import run_exp",
        stand_ins=("torchaudio",),  # read for rows with sound only
    ),
    "axolotl": Peer(requirement="axolotl==0.19.0", imports="from axolotl.core.builders import HFCausalTrainerBuilder"),
    "ms-swift": Peer(requirement="ms-swift==4.6.0", imports="from swift import rlhf_main, sft_main"),
    "torchtune": Peer(
        requirement="torchtune==0.6.1",
        imports="import torchtune.models.llama3, torchtune.datasets",
        beside=("torchao",),
    ),
    "unsloth": Peer(requirement="unsloth==2026.10.7", imports="from unsloth import FastLanguageModel"),
}


def pinned(constraints_text: str) -> dict[str, str]:
    """Name → `name==version` for each line of a constraints file."""
    lines = (line.split("#")[0].strip() for line in constraints_text.splitlines())
    return {canonicalize_name(Requirement(line).name): line for line in lines if line}


def held_versions(peer: Peer) -> list[str]:
    """What pip is held to: torch, then the peer's own pins, at the versions of constraints.txt."""
    pins = pinned(CONSTRAINTS.read_text())
    return [pins[name] for name in ("torch", *peer.own_pins)]


def drags_torch_in(name: str) -> bool:
    """Whether a package of that name is, or brings, another torch or CUDA libraries."""
    canonical = canonicalize_name(name)
    return canonical in TORCH_FAMILY or canonical.startswith(CUDA_PREFIXES)


def installable(requires: Iterable[str]) -> list[str]:
    """The requirements of a package's metadata that apply here, without extras' and without torch's family."""
    kept = []
    for line in requires:
        requirement = Requirement(line)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and not drags_torch_in(requirement.name):
            requirement.marker = None
            kept.append(str(requirement))
    return sorted(set(kept))


def pip_command(python: Path, constraints: Path, *arguments: str) -> list[str]:
    """A pip install that is held to the constraints."""
    return [str(python), "-m", "pip", "install", "--no-input", "-c", str(constraints), *arguments]


def unwanted(pip_line: str) -> str | None:
    """The package that drags another torch or CUDA in, where a line of pip's output says that it is being fetched."""
    match = re.match(r"\s*Collecting ([A-Za-z0-9._-]+)", pip_line)
    return match[1] if match and match[1] != "torch" and drags_torch_in(match[1]) else None


def watched(command: list[str], *, log: Path, deadline: float, constraints: Path) -> None:
    """Run a command into `log`; stop it at the deadline or when it fetches an unwanted package.

    Raises InstallError with the first line of the reason.
    """
    # By the environment too: -c does not reach the environments in which pip builds source packages.
    held = {"PIP_CONSTRAINT": str(constraints), "PIP_BUILD_CONSTRAINT": str(constraints)}
    process = subprocess.Popen(
        command,
        env=os.environ | held | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that what pip has started to build a package is stopped with it
    )
    timer = threading.Timer(max(deadline - time.monotonic(), 0), os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    lines: list[str] = []
    with log.open("a") as log_file, process:
        assert process.stdout is not None
        for line in process.stdout:
            log_file.write(line)
            lines.append(line.strip())
            if package := unwanted(line):
                timer.cancel()
                os.killpg(process.pid, signal.SIGKILL)
                raise InstallError(f"it would fetch {package}, which is for a GPU or brings another torch")
    timer.cancel()
    if process.returncode == -signal.SIGKILL and time.monotonic() >= deadline:
        raise InstallError(f"not done within {TIME_LIMIT_S} s")
    if process.returncode != 0:
        raise InstallError(reason(lines))


def reason(lines: list[str]) -> str:
    """The line that says why: pip's first error, else the exception that ended a traceback, else the last line."""
    lines = [line for line in lines if line and not line.startswith("ERROR: Ignored")]  # yanked versions: no error
    errors = [line.removeprefix("ERROR:").split(" (from versions")[0].strip() for line in lines if "ERROR:" in line]
    raised = [place for place, line in enumerate(lines) if re.match(r"[A-Za-z_.]*(Error|Exception|Exit)\b", line)]
    # The message of an exception may begin on the line after its name.
    exception = [" ".join(lines[raised[-1] : raised[-1] + 1 + lines[raised[-1]].endswith(":")])] if raised else []
    return (errors[:1] or exception or lines[-1:] or ["it failed without a word"])[0]


def install(peer: Peer, venv: Path) -> dict[str, str]:
    """Make the environment and return the versions of what matters in it; raises InstallError."""
    deadline = time.monotonic() + TIME_LIMIT_S
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
    python, log = venv / "bin" / "python", venv / "install.log"
    constraints = venv / "constraints.txt"
    torch, *others = held_versions(peer)
    constraints.write_text("\n".join([torch, *others]) + "\n")

    def pip(*arguments: str) -> None:
        watched(pip_command(python, constraints, *arguments), log=log, deadline=deadline, constraints=constraints)

    pip("--upgrade", "pip")  # The one that Python 3.11 brings walks back through gradio's releases for minutes.
    pip(torch)
    pip("--no-deps", *([peer.requirement] if peer.checkout is None else ["--editable", peer.checkout]))
    own_name = Requirement(peer.requirement).name
    own = next(iter(importlib.metadata.distributions(name=own_name, path=[str(site_packages(venv))])))
    pip(*installable(own.requires or []), *others, *peer.beside)
    for module in peer.stand_ins:
        (site_packages(venv) / f"{module}.py").write_text('"""Empty: no build of this module without CUDA."""\n')
    watched([str(python), "-c", peer.imports], log=log, deadline=deadline, constraints=constraints)
    return versions(venv, own_name)


def site_packages(venv: Path) -> Path:
    """Where the environment's packages lie."""
    return next(venv.glob("lib/python*/site-packages"))


def versions(venv: Path, own_name: str) -> dict[str, str]:
    """Package → version of what matters in the environment, the peer's own first."""
    distributions = importlib.metadata.distributions(path=[str(site_packages(venv))])
    found = {canonicalize_name(distribution.name): distribution.version for distribution in distributions}
    return {package: found[package] for package in dict.fromkeys((own_name, *VERSIONS_SHOWN)) if package in found}


def outcome(name: str, *, again: bool) -> dict:
    """`{"recipe", "versions" | "reason"}` of a peer: as recorded where its recipe is unchanged, else installed now."""
    peer, venv = PEERS[name], VENVS / name
    recipe = json.loads(json.dumps(asdict(peer))) | {"held": held_versions(peer)}
    record_path = venv / "peer.json"
    if record_path.exists() and not again:
        record = json.loads(record_path.read_text())
        if record["recipe"] == recipe:
            return record
    try:
        record = {"recipe": recipe, "versions": install(peer, venv)}
    except InstallError as error:
        record = {"recipe": recipe, "reason": str(error)}
    record_path.write_text(json.dumps(record, indent=1))
    return record


def main() -> int:
    """Install the peers named, or all; print what is there and what is not, and why."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PEERS)}; all by default")
    parser.add_argument("--again", action="store_true", help="install anew what was installed or refused before")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in PEERS]
    if unknown:
        parser.error(f"{unknown[0]} is no peer; name any of {', '.join(PEERS)}")
    VENVS.mkdir(parents=True, exist_ok=True)
    outcomes = {name: outcome(name, again=arguments.again) for name in arguments.names or PEERS}
    for name, record in outcomes.items():
        if "versions" in record:
            print(f"{name:14} " + ", ".join(f"{package} {version}" for package, version in record["versions"].items()))
    for name, record in outcomes.items():
        if "reason" in record:
            print(f"{name:14} not here: {record['reason']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
