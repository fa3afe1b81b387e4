"""What a run came from: its stages, their base models and data, as a graph for the terminal, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Literal, NamedTuple

from rich.text import Text
from rich.tree import Tree

from chatalign.artifact import ARTIFACT_FILE, Artifact, load_artifact

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y = 190, 62, 96, 22  # of a box and between boxes, in SVG units
_LETTERS = 26  # of a line in a box
_MERMAID_ENTITIES = (("#", "#35;"), ('"', "#quot;"), ("<", "#lt;"), (">", "#gt;"), ("|", "#124;"), ("`", "#96;"))


class Node(NamedTuple):
    """A stage, a model or a source of rows: its name, and a line or two with what identifies it."""

    name: str
    kind: Literal["stage", "model", "data"]
    lines: tuple[str, ...]


class Edge(NamedTuple):
    """The node with key `source` went into the stage `target` as `role`."""

    source: str
    target: str
    role: str


class Lineage(NamedTuple):
    """Nodes by a key, a stage's its name, sources before what came of them; and the edges between keys."""

    nodes: dict[str, Node]
    edges: list[Edge]


def finished_runs(folder: str | Path) -> dict[str, Artifact]:
    """The finished runs of a folder by name, parents first: the run that it is, or a pipeline's stages.

    Raises ArtifactError where it holds none, or one that can't be read.
    """
    folder = Path(folder)
    places = [folder] if (folder / ARTIFACT_FILE).is_file() else [p.parent for p in folder.glob(f"*/{ARTIFACT_FILE}")]
    found = {place: load_artifact(place) for place in sorted(places) if not place.name.endswith(".previous")}
    if not found:
        load_artifact(folder)  # says so
    by_id = {artifact.run_id: artifact for artifact in found.values()}

    def depth(artifact: Artifact) -> int:
        above = [depth(by_id[parent.run_id]) for parent in artifact.parents if parent.run_id in by_id]
        return 1 + max(above, default=0)

    return {place.name: artifact for place, artifact in sorted(found.items(), key=lambda item: depth(item[1]))}


def lineage_of(runs: Mapping[str, Artifact]) -> Lineage:
    """The graph of runs, of the models that came from elsewhere and of the rows that they read."""
    names = {artifact.run_id: name for name, artifact in runs.items()}
    nodes: dict[str, Node] = {}
    edges = []
    for name, artifact in runs.items():
        for node, role in _sources(artifact, names):
            key = f"{node.name} {node.lines[-1]}"  # rows that were altered between two runs are two sources
            nodes.setdefault(key, node)
            edges.append(Edge(key, name, role))
        edges += [Edge(names[p.run_id], name, p.role) for p in artifact.parents if p.run_id in names]
        about = (f"{artifact.stage} · run {artifact.run_id}", f"weights {_weights(artifact)}")
        nodes[name] = Node(name, "stage", about)
    return Lineage(nodes, edges)


def _sources(artifact: Artifact, names: Mapping[str, str]) -> Iterator[tuple[Node, str]]:
    """What a run took from outside `names`: runs elsewhere, its base model where no run stands for it, its rows."""
    for parent in artifact.parents:
        if parent.run_id not in names:
            lines = (f"run {parent.run_id}", f"fingerprint {parent.fingerprint[:12]}")
            yield Node(parent.path, "model", lines), parent.role
    base = artifact.base_model
    if base is not None and not any(parent.role == "model" for parent in artifact.parents):
        yield Node(base.name_or_path, "model", (f"weights {(base.sha256 or base.revision or '–')[:12]}",)), "model"
    for used in artifact.data:
        yield Node(used.path, "data", (f"{used.used:,} of {used.rows:,} rows", f"sha256 {used.sha256[:12]}")), "rows"


def _weights(artifact: Artifact) -> str:
    files = [digest for path, digest in artifact.files.items() if path.endswith(".safetensors")]
    return files[0][:12] if files else "–"


def tree(graph: Lineage, title: str) -> Tree:
    """Every stage with what went into it, for the terminal."""
    root = Tree(Text(title, style="bold"))
    for node in graph.nodes.values():
        if node.kind == "stage":
            branch = root.add(Text.assemble((node.name, "bold"), f"  {', '.join(node.lines)}"))
            for edge in graph.edges:
                if edge.target == node.name:
                    source = graph.nodes[edge.source]
                    branch.add(Text.assemble(f"{edge.role}: {source.name}", (f"  {', '.join(source.lines)}", "dim")))
    return root


def mermaid(graph: Lineage) -> str:
    """The graph as a Mermaid flowchart in a Markdown fence, which GitHub and GitLab draw; empty without edges."""
    if not graph.edges:
        return ""
    ids = {name: f"n{number}" for number, name in enumerate(graph.nodes)}
    shapes = {"stage": ('["', '"]'), "model": ('(["', '"])'), "data": ('[("', '")]')}
    lines = ["```mermaid", "flowchart LR"]
    for name, node in graph.nodes.items():
        start, end = shapes[node.kind]
        text = "<br/>".join(_quoted(part) for part in (_short(node.name), *node.lines))
        lines.append(f"  {ids[name]}{start}{text}{end}")
    lines += [f"  {ids[e.source]} -->|{_quoted(e.role)}| {ids[e.target]}" for e in graph.edges]
    return "\n".join([*lines, "```"])


def _quoted(text: str) -> str:
    """Mermaid's own escapes: a name may hold anything."""
    for character, entity in _MERMAID_ENTITIES:
        text = text.replace(character, entity)
    return " ".join(text.split())


def _short(name: str) -> str:
    """The last parts of a long path: what tells two files apart is at its end."""
    return name if len(name) <= _LETTERS else "…" + name[-(_LETTERS - 1) :]


def svg(graph: Lineage) -> str:
    """The graph as inline SVG, sources left of what came of them, in the page's own colours; empty without edges."""
    if not graph.edges:
        return ""
    places = _places(graph)
    width = max(x for x, _ in places.values()) + _WIDTH + 2
    height = max(y for _, y in places.values()) + _HEIGHT + 2
    parts = [f'<svg class="lineage" viewBox="-1 -1 {width} {height}" width="{width}" role="img" aria-label="Lineage">']
    arriving = {name: [edge for edge in graph.edges if edge.target == name] for name in graph.nodes}
    for name, edges in arriving.items():
        edges.sort(key=lambda edge: places[edge.source][1])
        for number, edge in enumerate(edges, start=1):
            x, y = places[name]
            parts.append(_arrow(edge, places[edge.source], (x, y + _HEIGHT * number / (len(edges) + 1)), graph))
    parts += [_box(node, *places[name]) for name, node in graph.nodes.items()]
    return "".join([*parts, "</svg>"])


def _arrow(edge: Edge, source: tuple[float, float], end: tuple[float, float], graph: Lineage) -> str:
    """A curve from the right side of a box to a place on the left side of another; what it means is its tooltip."""
    (x0, y0), (x1, y1) = (source[0] + _WIDTH, source[1] + _HEIGHT / 2), end
    bend = _GAP_X / 2
    curve = f"M{x0:g} {y0:g} C{x0 + bend:g} {y0:g} {x1 - bend:g} {y1:g} {x1:g} {y1:g}"
    title = escape(f"{graph.nodes[edge.source].name} is the {edge.role} of {edge.target}")
    return f'<path d="{curve}"><title>{title}</title></path>'


def _box(node: Node, x: float, y: float) -> str:
    lines = [
        f'<text class="{"line" if row else "name"}" x="{x + 10:g}" y="{y + 18 + 17 * row:g}">{escape(text)}</text>'
        for row, text in enumerate((_short(node.name), *node.lines))
    ]
    box = f'<rect x="{x:g}" y="{y:g}" width="{_WIDTH}" height="{_HEIGHT}" rx="8"/>'
    return f'<g class="{node.kind}"><title>{escape(node.name)}</title>{box}{"".join(lines)}</g>'


def _places(graph: Lineage) -> dict[str, tuple[float, float]]:
    """The upper left corner of each box: a column for each step from the sources, one box under another."""
    columns: dict[str, int] = {}
    for name in graph.nodes:  # sources come before what came of them
        columns[name] = 1 + max((columns[e.source] for e in graph.edges if e.target == name), default=-1)
    for name in graph.nodes:  # a source stands just before what takes it first
        taken = [columns[e.target] for e in graph.edges if e.source == name]
        if graph.nodes[name].kind != "stage" and taken:
            columns[name] = min(taken) - 1
    filled: dict[int, int] = {}
    places: dict[str, tuple[float, float]] = {}
    for name, column in columns.items():
        row = filled[column] = filled.get(column, -1) + 1
        places[name] = (column * (_WIDTH + _GAP_X), row * (_HEIGHT + _GAP_Y))
    return places
