"""examples/tour.ipynb: a notebook that runs from top to bottom. What it names, test_docs.py looks for."""

import json
import os

import nbformat
import pytest
from helpers.paths import ROOT, TOUR
from nbclient import NotebookClient

STAGES = ["base", "pruned", "sparse", "retrained"]


@pytest.fixture(scope="module")
def tour():
    return nbformat.read(TOUR, as_version=4)


@pytest.fixture(scope="module")
def toured(tmp_path_factory):
    """The tour, run for a few steps in a folder that has links to all of the repository; that folder, and its links."""
    folder = tmp_path_factory.mktemp("repository")
    links = {folder / path.name: path for path in ROOT.iterdir() if path.name not in ("runs", "checkpoints")}
    for link, path in links.items():
        link.symlink_to(path)
    notebook = nbformat.read(TOUR, as_version=4)
    resources = {"metadata": {"path": folder}}
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources, coalesce_streams=True)
    return client.execute(env=os.environ | {"QUICK": "1"}), folder, set(links)


def test_the_tour_is_a_valid_notebook(tour):
    nbformat.validate(tour)


def test_shell_cells_of_the_tour_end_at_the_first_command_that_fails(tour):
    firsts = {cell.source.splitlines()[0] for cell in tour.cells if cell.source.startswith("%")}
    assert firsts == {"%%bash -eo pipefail"}


@pytest.mark.slow
@pytest.mark.ci
def test_the_tour_writes_in_its_folder_of_runs_alone(toured):
    _, folder, links = toured
    assert set(folder.iterdir()) - links == {folder / "runs"}
    assert list((folder / "runs").iterdir()) == [folder / "runs/tour"]


@pytest.mark.slow
@pytest.mark.ci
def test_the_tours_tables_have_numbers(toured):
    tables = [json.loads((toured[1] / f"runs/tour/{name}.json").read_text()) for name in ("summary", "ner")]
    stages = {row["stage"]: row["exact_match"] for row in tables[0]["stages"]}
    assert list(stages) == STAGES and stages["base"] > 0.8
    assert all(0 <= share <= 1 for share in [*stages.values(), *(tagger["f1"] for tagger in tables[1])])


@pytest.mark.slow
@pytest.mark.ci
def test_the_tour_ends_with_entities_of_every_text(toured):
    last = [cell for cell in toured[0].cells if cell.cell_type == "code"][-1]
    rows = [json.loads(line) for line in last.outputs[0].text.splitlines()]
    assert len(rows) == 2 and all(isinstance(row["entities"], list) for row in rows)
