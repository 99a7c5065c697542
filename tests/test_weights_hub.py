"""Where a model is found: names, directories, the hub. Nothing here touches the network."""

import shutil
from pathlib import Path
from unittest import mock

import huggingface_hub
import pytest
import tokenizers
from huggingface_hub import errors
from test_weights_hf import assert_same, bundle_of, random_model

from dgemma_jax import bundle as bundles
from dgemma_jax.weights import hub, registry

RELEASE = "google/diffusiongemma-26B-A4B-it"
COMMIT = "f7f5b7f5fa82ffc52addd066915886d497f5517b"


@pytest.fixture
def saved(tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    bundles.save(bundle_of(random_model()), tmp_path / "saved", max_shard_size=20_000)
    tokenizer.save(str(tmp_path / "saved" / "tokenizer.json"))
    return tmp_path / "saved"


@pytest.fixture
def calls(monkeypatch, saved):
    """The calls of a hub that has `saved` in its cache, unless `error` is set."""

    class Calls(list):
        error = None
        directory = saved

    made = Calls()

    def snapshot_download(repo, **options):
        made.append((repo, options))
        if made.error and not (options["local_files_only"] and made.error is not errors.LocalEntryNotFoundError):
            raise made.error
        return str(made.directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return made


def test_the_release_is_pinned_and_not_asked_for_again_when_it_is_here(calls):
    loaded = bundles.load(RELEASE)
    assert_same(random_model(), loaded.model)
    ((repo, options),) = calls
    assert (repo, options["revision"], options["local_files_only"]) == (RELEASE, COMMIT, True)
    assert set(options["allow_patterns"]) >= {"*.safetensors", "*.json", "*.jinja"}
    assert not any(pattern in ("*", "*.bin") for pattern in options["allow_patterns"])


def test_an_incomplete_download_is_resumed(calls, saved):
    whole, shard = saved, sorted(saved.glob("*.safetensors"))[2]
    content = shard.read_bytes()
    shard.unlink()
    real = huggingface_hub.snapshot_download

    def resumes(repo, **options):
        if not options["local_files_only"]:
            shard.write_bytes(content)
        return real(repo, **options)

    huggingface_hub.snapshot_download = resumes
    try:
        assert hub.fetch(RELEASE) == whole
    finally:
        huggingface_hub.snapshot_download = real
    assert [options["local_files_only"] for _, options in calls] == [True, False]


def test_another_revision_or_model_is_asked_for_as_given(calls):
    hub.fetch("someone/finetune", revision="v2")
    assert [(repo, o["revision"], o["local_files_only"]) for repo, o in calls] == [("someone/finetune", "v2", False)]
    calls.clear()
    hub.fetch(RELEASE, revision="main")
    assert [(o["revision"], o["local_files_only"]) for _, o in calls] == [("main", False)]


@pytest.mark.parametrize(
    "kind, message",
    [
        ("GatedRepoError", "Accept the terms at https://huggingface.co/a/b"),
        ("RevisionNotFoundError", "a/b has no revision 'v9'"),
        ("RepositoryNotFoundError", "no model 'a/b' on the hub, or it is private"),
        ("HfHubHTTPError", "downloading a/b at v9 failed"),
        ("LocalEntryNotFoundError", "not in the local cache and the hub cannot be reached"),
        ("OfflineModeIsEnabled", "downloading a/b at v9 failed"),
        (errors.HfHubHTTPError.__bases__[0], "downloading a/b at v9 failed"),  # a broken connection
    ],
)
def test_errors_of_the_hub_say_what_to_do(calls, kind, message):
    kind = getattr(errors, kind) if isinstance(kind, str) else kind
    try:
        calls.error = kind("refused")
    except TypeError:
        calls.error = kind("refused", response=mock.MagicMock())
    with pytest.raises(ValueError, match=message):
        bundles.load("a/b", revision="v9")


@pytest.mark.parametrize("source", ["nanoo", "no/such/directory", "/no/such", "../x", "a/b/", "", "https://x.y/z"])
def test_what_is_none_of_the_three_is_an_error_that_lists_the_names(calls, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what lies beside the project is not ours to know
    with pytest.raises(ValueError, match=r"no directory, no known name \(nano, nano-backdoor, google/.*no hub id"):
        bundles.load(source) if source else bundles.load("?")
    assert not calls


def test_a_path_is_never_a_hub_id(calls):
    with pytest.raises(ValueError, match="is no directory"):
        bundles.load(Path("owner/name"))
    assert not calls


def test_a_file_is_not_a_directory(saved):
    with pytest.raises(ValueError, match=r"config.json is a file; give the directory"):
        bundles.load(saved / "config.json")


def test_embedded_models_are_looked_up_in_the_package_first_then_in_the_clone(tmp_path, saved, monkeypatch):
    places = tmp_path / "package", tmp_path / "clone"
    monkeypatch.setattr(registry, "_PLACES", places)
    with pytest.raises(ValueError, match=r"embedded model 'nano' is in neither"):
        bundles.load("nano")
    shutil.copytree(saved, places[1] / "nano")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano").mkdir()  # a directory of the same name does not hide it
    assert bundles.load("nano").source == str(places[1] / "nano")
    shutil.copytree(saved, places[0] / "nano")
    assert bundles.locate("nano") == places[0] / "nano"
    assert bundles.locate(Path("nano")) == Path("nano")


def test_the_places_are_the_package_and_the_root_of_the_clone():
    import dgemma_jax

    package = Path(dgemma_jax.__file__).parent
    assert (package / "_checkpoints", package.parent / "checkpoints") == registry._PLACES
