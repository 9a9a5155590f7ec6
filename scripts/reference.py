"""Write docs/reference.md: signatures and docstrings of what authors use, and what each shipped connector declares.

    python scripts/reference.py

Only the table of capabilities is asked of the package; everything else is read from the source, without importing it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/reference.md"

HEAD = """\
# Reference

Every public name that an author uses, with its signature and docstring. This page is written by
`python scripts/reference.py`; [authors.md](authors.md) explains how the parts work together, and
[write_a_connector.md](write_a_connector.md) builds a connector of them.
"""

# Heading of the page -> (module whose docstring begins the section, {module that defines them: names}).
SECTIONS: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "kvsdk.connector": (
        "kvsdk.connector.interface",
        {
            "kvsdk.connector.interface": (
                *("Consumer", "Producer", "Connector"),
                *("SchedulerHalf", "ConsumerScheduler", "ProducerScheduler"),
                *("WorkerHalf", "ConsumerWorker", "ProducerWorker"),
                *("Context", "CacheGeometry", "RequestView", "BlockIds"),
                *("Hit", "ASK_AGAIN", "AskAgain", "Keep", "Holds"),
            ),
            "kvsdk.connector.tasks": ("LoadTask", "SaveTask", "TaskState"),
        },
    ),
    "kvsdk.buffer.keys": ("kvsdk.buffer.keys", {"kvsdk.buffer.keys": ("PrefixKeys", "prefix_keys")}),
    "kvsdk.layout": ("kvsdk.layout", {"kvsdk.layout": ("CacheLayout", "LayerLayout", "layout_of")}),
    "kvsdk.kernels": ("kvsdk.kernels", {"kvsdk.kernels": ("BlockStore", "DIGEST_ALGORITHM")}),
    "kvsdk.errors": ("kvsdk.errors", {"kvsdk.errors": ()}),
    "kvsdk.testing": ("kvsdk.testing", {"kvsdk.testing": ()}),
    "kvsdk.testing.suite": ("kvsdk.testing.suite", {}),
}
"""An empty tuple of names stands for all public ones."""

MADE_BY_KVSDK = {"CacheGeometry", "Context", "LoadTask", "RequestView", "SaveTask"}
"""Classes that authors get and do not make: their constructors are left out."""

WHOLE_WORDS = {"break_long_words": False, "break_on_hyphens": False}
SECTION = re.compile(r"^(Args|Attributes|Raises|Returns):$")
ITEM = re.compile(r"^(\*{0,2}[\w.]+): (.*)$", re.DOTALL)


def page() -> str:
    """The whole page."""
    from kvsdk.testing.capabilities import capabilities_table

    parts = [HEAD]
    for heading, (about, modules) in SECTIONS.items():
        parts += [f"## {heading}\n", prose(module_doc(about))]
        for module, names in modules.items():
            parts += [entry(*defined(module, name)) for name in names or public(module)]
    parts += [
        "## Capabilities\n",
        "What each connector of this package declares, as `kvsdk.testing.capabilities_table()` writes it.\n",
        capabilities_table() + "\n",
    ]
    return "\n".join(parts)


# ---- finding things in the source


@functools.cache
def tree(module: str) -> ast.Module:
    path = ROOT.joinpath(*module.split("."))
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())


def module_doc(module: str) -> str:
    return ast.get_docstring(tree(module)) or ""


def public(module: str) -> list[str]:
    """The public names of `kvsdk.testing`, or the classes that another module defines."""
    if module == "kvsdk.testing":
        return sorted(parts_of_testing())
    return [node.name for node in tree(module).body if isinstance(node, ast.ClassDef)]


def parts_of_testing() -> dict[str, str]:
    """Public name of `kvsdk.testing` to the module that defines it, as its `__getattr__` finds it."""
    (where,) = (node for node in tree("kvsdk.testing").body if "_WHERE" in names_of(node))
    return {name: f"kvsdk.testing.{part}" for name, part in ast.literal_eval(where.value).items()}


def defined(module: str, name: str) -> tuple[str, str, ast.stmt, str]:
    """(module, name, the statement that makes it, the string below it), wherever `module` has it from."""
    if module == "kvsdk.testing":
        module = parts_of_testing()[name]
    body = tree(module).body
    for i, node in enumerate(body):
        if name in names_of(node):
            return module, name, node, string_after(body, i)
        if isinstance(node, ast.ImportFrom) and name in [one.name for one in node.names]:
            return defined(node.module, name)
    raise LookupError(f"{module} does not define {name}")


def names_of(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def string_after(body: list[ast.stmt], i: int) -> str:
    after = body[i + 1] if i + 1 < len(body) else None
    is_string = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    return inspect.cleandoc(after.value.value) if is_string and isinstance(after.value.value, str) else ""


def family(module: str, node: ast.ClassDef) -> Iterator[ast.ClassDef]:
    """A class and its private bases, whose members are documented as its own."""
    yield node
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id.startswith("_"):
            yield from family(module, defined(module, base.id)[2])


# ---- writing


def entry(module: str, name: str, node: ast.stmt, below: str) -> str:
    if isinstance(node, ast.ClassDef):
        return class_entry(module, node)
    if isinstance(node, ast.FunctionDef):
        return f"### {name}\n\n`{signature(node)}`\n\n{prose(doc_of(node))}"
    return f"### {name}\n\n`{name} = {ast.unparse(node.value)}`\n\n{prose(below)}".rstrip() + "\n"


def class_entry(module: str, node: ast.ClassDef) -> str:
    relatives = list(family(module, node))
    bases = [base.id for one in relatives for base in one.bases if isinstance(base, ast.Name)]
    shown = [f"`{base}`" for base in bases if not base.startswith("_") and base not in ("ABC", "RuleBasedStateMachine")]
    made = constructor(node, relatives)
    parts = [f"### {node.name}\n"]
    parts += [f"`{made}`\n"] if made else []
    parts += [f"Extends {', '.join(dict.fromkeys(shown))}.\n"] if shown else []
    parts += [prose(doc_of(node))]
    items = {name: text for one in reversed(relatives) for name, text in members(one)}
    if items and "\n- " in parts[-1]:  # else the two lists would be one
        parts += ["Members:\n"]
    return "\n".join([*parts, "".join(items.values())]).rstrip() + "\n"


def constructor(node: ast.ClassDef, relatives: list[ast.ClassDef]) -> str:
    if node.name in MADE_BY_KVSDK:
        return ""
    if any("dataclass" in ast.unparse(one) for one in node.decorator_list):
        fields = [one for one in node.body if isinstance(one, ast.AnnAssign)]
        if any("_can" in ast.unparse(one) for one in fields):
            return f"{node.name}(...)"  # the table of capabilities has every field
        return f"{node.name}({', '.join(field(one) for one in fields)})"
    for one in relatives:
        for member in one.body:
            if isinstance(member, ast.FunctionDef) and member.name == "__init__":
                return f"{node.name}({arguments(member)})"
    return ""


def field(node: ast.AnnAssign) -> str:
    factory = re.search(r"default_factory=(dict|list)", ast.unparse(node.value) if node.value else "")
    default = ast.parse(f"{factory[1]}()", mode="eval").body if factory else node.value
    return argument(ast.unparse(node.target), node.annotation, default)


def argument(name: str, annotation: ast.expr | None, default: ast.expr | None) -> str:
    text = f"{name}: {ast.unparse(annotation)}" if annotation else name
    return f"{text} = {ast.unparse(default)}" if default else text


def arguments(node: ast.FunctionDef) -> str:
    """As they stand in the source, without `self` and `cls`."""
    every = node.args
    positional = [*every.posonlyargs, *every.args]
    defaults = [*[None] * (len(positional) - len(every.defaults)), *every.defaults]
    texts = [argument(one.arg, one.annotation, default) for one, default in zip(positional, defaults, strict=True)]
    if positional and positional[0].arg in ("self", "cls"):
        del texts[0]
    if every.vararg:
        texts.append(argument(f"*{every.vararg.arg}", every.vararg.annotation, None))
    elif every.kwonlyargs:
        texts.append("*")
    only = zip(every.kwonlyargs, every.kw_defaults, strict=True)
    texts += [argument(one.arg, one.annotation, default) for one, default in only]
    if every.kwarg:
        texts.append(argument(f"**{every.kwarg.arg}", every.kwarg.annotation, None))
    return ", ".join(texts)


def signature(node: ast.FunctionDef) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({arguments(node)}){'' if returns == ' -> None' else returns}"


def members(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """(name, Markdown) of each public member in the source's order; of attributes, those with a docstring."""
    for i, one in enumerate(node.body):
        for name in names_of(one):
            if name == "__init__" and doc_of(one) and node.name not in MADE_BY_KVSDK:
                yield name, item("the constructor", doc_of(one))
            elif name.startswith("_"):
                continue
            elif isinstance(one, ast.FunctionDef):
                yield name, item(method(one), doc_of(one))
            elif below := string_after(node.body, i):
                yield name, item(f"`{argument(name, getattr(one, 'annotation', None), None)}`", below)
            elif any("Enum" in ast.unparse(base) for base in node.bases):
                yield name, item(f"`{ast.unparse(one)}`", "")


def method(node: ast.FunctionDef) -> str:
    decorators = [ast.unparse(one) for one in node.decorator_list]
    if "property" in decorators:
        return f"`{argument(node.name, node.returns, None)}`"
    if "contextlib.contextmanager" in decorators:
        return f"`with {node.name}({arguments(node)})`"
    notes = {"abstractmethod": "to be implemented", "classmethod": "a class method", "staticmethod": "a static method"}
    return ", ".join([f"`{signature(node)}`", *(notes[one] for one in decorators if one in notes)])


def doc_of(node: ast.ClassDef | ast.FunctionDef) -> str:
    return ast.get_docstring(node) or ""


def item(head: str, doc: str) -> str:
    """An item of a list: the first paragraph of the docstring follows the name, everything else is indented."""
    first, _, rest = ("", "", doc) if SECTION.match(doc.partition("\n")[0]) else doc.partition("\n\n")
    text = textwrap.fill(f"- {head}: {first}" if first else f"- {head}", 120, subsequent_indent="  ", **WHOLE_WORDS)
    return f"{text}\n" + ("\n" + textwrap.indent(prose(rest), "  ") if rest else "")


def prose(doc: str) -> str:
    """A docstring as Markdown: its sections become lists."""
    out, lines = [], doc.splitlines()
    while lines:
        line = lines.pop(0)
        if not (section := SECTION.match(line)):
            out.append(line)
            continue
        body = []
        while lines and (not lines[0] or lines[0].startswith(" ")):
            body.append(lines.pop(0))
        text = inspect.cleandoc("\n".join(["", *body])).strip()
        if section[1] == "Returns":
            out += [*f"Returns: {text}".splitlines(), ""]
        else:
            out += [f"{section[1]}:", "", *listed(text), ""]
    return "\n".join(out).rstrip() + "\n" if doc else ""


def listed(text: str) -> list[str]:
    """`name: text` with lines that are indented further, as list items."""
    out = []
    for part in re.split(r"\n(?=\S)", text):
        name = ITEM.match(part)
        lines = (f"`{name[1]}`: {name[2]}" if name else part).splitlines()
        out += [f"- {lines[0]}", *(f"  {line.strip()}" for line in lines[1:])]
    return out


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(page())
