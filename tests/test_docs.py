"""The README and docs/ against the program: names, links, flags, commands, and the example."""

import itertools
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from small import batch, small_model
from torch import nn

from models import norm_blocks, norms
from models.norms import NORM_TYPES
from recipes import OPTIMIZERS, RECIPES
from utils.args import ENTRIES, build_parser, parse_args

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README, NORMS, RECIPE_PAGE, FILES = (
    ROOT / n for n in ("README.md", "docs/norm_types.md", "docs/recipes.md", "docs/files.md")
)
# Flags of programs that are not ours
FOREIGN = {"--nproc_per_node", "--logdir", "--index-url"}

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def section(page, heading):
    """What stands under `## heading` on `page`, up to the next heading of that level."""
    parts = re.split(r"^## (.*)\n", page.read_text(), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))[heading]


def rows(text):
    """The cells of each row of the tables in `text`, headings included."""
    lines = re.findall(r"^\| ?(.*) ?\|$", text, re.M)
    return [[cell.strip() for cell in line.split("|")] for line in lines if line[:3] != "---"]


def code(cell):
    return re.findall(r"`([^`]+)`", cell)


def blocks(page, language=""):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [text for kind, text in found if kind == language]


def commands(page):
    """The words of each line of shell in `page`, without comments and assignments before it."""
    for block in blocks(page):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words))


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 200


# ---------------------------------------------------------------- names


def test_norm_types_are_named():
    """Truth: NORM_TYPES, its order included: each has one place in the table, and its results."""
    in_readme = {row[0] for row in rows(README.read_text())} & NORM_TYPES.keys()
    in_table = [row for row in rows(NORMS.read_text()) if len(row) == 6 and row[0] != "name"]
    assert [name for row in in_table for name in code(row[0])] == list(NORM_TYPES)
    assert in_readme == NORM_TYPES.keys()


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_the_table_of_norm_types(norm_type):
    """Truth: the model's last norm, and `own_start`, which the page lists."""
    row = next(row for row in rows(NORMS.read_text()) if row[0] == f"`{norm_type}`")
    final = small_model(norm_type).transformer.encoder.encoder_norm
    assert (row[3] == "none") == isinstance(final, nn.Identity)
    listed = code(section(NORMS, "Recipes and starts").split("in the code):")[1])
    assert (norm_type in listed) == NORM_TYPES[norm_type].block.own_start


def written(value):
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "" if value is None else str(value)


def test_recipes_and_entries():
    """Truth: recipes.py, as the command line has it: all recipes, all entries, their values."""
    text = RECIPE_PAGE.read_text()
    args = {name: vars(parse_args(["--name", "x", "--recipe", name])) for name in RECIPES}
    flags, entries = (rows(section(RECIPE_PAGE, heading)) for heading in ("Flags", "Entries"))
    pages = [name for name in RECIPES if not name.startswith("bench_")]
    assert flags[0] == ["flag", *(f"`{name}`" for name in pages)]
    shown = ["reference", "small", "finetune"]
    assert entries[0][:4] == ["entry", *(f"`{name}`" for name in shown)]
    found = [code(row[0])[0] for row in flags[1:] + entries[1:]]
    assert set(RECIPES["reference"]()) <= set(found)
    assert [name for name in found if name in ENTRIES] == list(ENTRIES)
    assert len(found) == len(set(found))
    for row in flags[1:]:
        assert row[1:] == [written(args[name][code(row[0])[0]]) for name in pages]
    for row in entries[1:]:
        name = code(row[0])[0]
        assert row[1:4] == [written(args[recipe][name]) for recipe in shown]
        assert args["bench"][name] == args["small"][name]
    for name in pages:
        assert f"`{name}`" in text and f"`{name}`" in README.read_text()
    variants = rows(section(RECIPE_PAGE, "The bench's second axis"))
    assert {code(row[0])[0]: code(row[1]) for row in variants[1:]} == {
        name: [f"{k}={written(v)}" for k, v in page().items() if args["bench"].get(k) != v]
        for name, page in RECIPES.items()
        if name.startswith("bench_")
    }


def test_optimizers():
    """Truth: OPTIMIZERS, names and values."""
    table = [row for row in rows(section(RECIPE_PAGE, "Optimizers")) if row[0] != "`optimizer`"]
    found = {code(row[0])[0]: re.findall(r"`(\w+)` ([\d.,]*\d)", row[2]) for row in table}
    assert {name: dict(pairs) for name, pairs in found.items()} == {
        name: {entry: written(value) for entry, value in own.items()}
        for name, own in OPTIMIZERS.items()
    }


def test_what_the_bench_takes():
    """Truth: train_small.sh's ${NAME:-default}."""
    text = (ROOT / "train_small.sh").read_text()
    (factors,) = re.findall(r"for factor in \((.*?)\)", text)
    rates = [
        f"{float(factor) * RECIPES['bench']().learning_rate:g}" for factor in factors.split(",")
    ]
    found = dict(re.findall(r"\$\{([A-Z_]+):-(.*?)\}", text)) | {
        "NORMS": "all norm types",
        "RATES": f"0.25, 0.5, 1 and 2 times the recipe's: {' '.join(rates)}",
        "NAME": "the recipe, if it is not bench",
    }
    table = rows(section(RECIPE_PAGE, "The bench"))[1:]
    assert {code(row[0])[0]: row[1].replace("`", "") for row in table} == found


# ---------------------------------------------------------------- files, links


def test_the_table_of_files():
    """Truth: the tracked programs, but for empty files; each stands there once."""
    table = rows(section(FILES, "Files of the program"))[1:]
    found = [name for row in table for name in code(row[0])]
    try:
        listed = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git, or no repository")
    expected = [
        path
        for path in listed.splitlines()
        if re.fullmatch(r"((models|utils)/)?[^/]+\.(py|sh)", path)
        and (ROOT / path).exists()
        and (ROOT / path).stat().st_size
    ]
    assert sorted(found) == sorted(expected)


def anchors(page):
    """GitHub's, of the page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"(?ms)^```.*?^```$", "", page.read_text()), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@by_page
def test_links_and_images(page):
    """Truth: what they lead to exists, headings included."""
    text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text())
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in links:
        if "://" not in link:
            name, _, anchor = link.partition("#")
            target = (page.parent / name) if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


# ---------------------------------------------------------------- flags and commands


def source_flags(path):
    return set(re.findall(r'"(--[a-z][\w-]*)"', path.read_text()))


@by_page
def test_flags_exist(page):
    """Truth: train.py's parser; the other programs' sources."""
    known = set(build_parser()._option_string_actions) | FOREIGN
    for path in (*ROOT.glob("*.py"), ROOT / "tests" / "soak.py"):
        known |= source_flags(path)
    found = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", re.sub(r"<!--.*?-->", "", page.read_text())))
    assert found - known == set()


@by_page
def test_commands(page):
    """Truth: train.py's parser takes its commands; the other programs have the flags of theirs."""
    for words in commands(page):
        if words and (program := next((w for w in words if w.endswith((".py", ".sh"))), None)):
            assert (ROOT / program).exists()
            rest = words[words.index(program) + 1 :]
            if program == "train.py":
                parse_args([word.replace("$norm", "LN") for word in rest])
            elif program.endswith(".sh"):
                parse_args(["--name", "x", *rest])
            else:
                flags = {word for word in rest if word.startswith("--")}
                assert flags <= source_flags(ROOT / program), program


# ---------------------------------------------------------------- the example


@pytest.fixture
def added(monkeypatch):
    """The name of README's example of a norm type, added as the README says."""
    (block,) = blocks(README, "python")
    ((name, line),) = re.findall(r'`"(\w+)": (NormType\(.*?\)),`', README.read_text())
    assert name not in NORM_TYPES
    place = dict(vars(norm_blocks))  # the file it is put into, with its imports
    exec(block, place)
    monkeypatch.setitem(NORM_TYPES, name, eval(line, vars(norms) | {name: place[name]}))
    return name


def test_the_example_is_its_equation(added):
    """Truth: x <- x + 0.2 F(LN(x)), written out for the whole model; the class token as well."""
    model = small_model(added, depth=3).eval()
    images, _ = batch()

    def layer_norm(norm, x):
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * norm.weight + norm.bias

    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        x = model.transformer.embeddings(images)
        for block in model.transformer.encoder.layer:
            x = x + 0.2 * block.attn(layer_norm(block.attention_norm, x))
            x = x + 0.2 * block.ffn(layer_norm(block.ffn_norm, x))
        x = layer_norm(model.transformer.encoder.encoder_norm, x)
        torch.testing.assert_close(model(images)[0], model.head(x[:, 0]), rtol=1e-4, atol=1e-5)


def test_the_example_trains(added):
    """Truth: the loss of one batch falls in each of two steps; `--norm_type` takes the name."""
    assert parse_args(["--name", "x", "--norm_type", added]).norm_type == added
    model, losses = small_model(added), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(3):
        loss = model(*batch())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > losses[1] > losses[2]
