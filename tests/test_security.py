"""What docs/security.md promises of all code, and of folders and pictures that strangers made."""

from __future__ import annotations

import ast
import base64
import http.server
import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processing import IMAGE, FlamingoProcessor
from tests.eval.harness_model import write_model

ROOT = Path(__file__).parents[1]
CODE = sorted(path for room in ("flamingo", "train", "eval") for path in (ROOT / room).rglob("*.py"))


# -- all code ------------------------------------------------------------------------------


def calls(source: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Every call: its name with dots, and its named arguments as they are written."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg or "**": ast.unparse(k.value) for k in node.keywords}


def dangers(source: str) -> list[str]:
    """Calls that run what data says, or may ask somebody whether to."""
    found = []
    for name, given in calls(source):
        last = name.rpartition(".")[2]
        unpickles = re.fullmatch(
            r"(pickle|dill|cloudpickle|joblib|shelve|marshal)\.(loads?|open|Unpickler)", name
        )
        loose = name == "torch.load" and given.get("weights_only") != "True"
        objects = given.get("allow_pickle") == "True" or given.get("trust_remote_code") == "True"
        shell = given.get("shell") == "True" or name in ("os.system", "os.popen", "eval", "exec")
        unpacks = last in ("extractall", "extract") or name == "shutil.unpack_archive"
        yaml = name in ("yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.unsafe_load_all")
        asks = re.fullmatch(r"Auto\w+\.from_(pretrained|config)", name) and "trust_remote_code" not in given
        if unpickles or loose or objects or shell or unpacks or yaml or asks:
            found.append(name)
    return found


def test_no_code_runs_what_data_says():
    assert len(CODE) > 150
    assert {str(path): found for path in CODE if (found := dangers(path.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "pickle.load(file)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(words, shell=True)",
        "eval(text)",
        "tar.extractall(folder)",
        "yaml.unsafe_load(text)",
        "AutoTokenizer.from_pretrained(name)",
        "AutoModel.from_config(config, trust_remote_code=True)",
    ],
)
def test_a_dangerous_call_is_seen(source: str):
    assert dangers(source)


def test_harmless_calls_are_let_through():
    assert not dangers(
        "torch.load(p, weights_only=True); model.eval(); AutoModel.from_config(c, trust_remote_code=False)"
    )


# -- model folders -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def test_code_in_a_model_folder_is_refused_even_where_somebody_says_yes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """transformers asks on the terminal, and takes a line of any input that says y."""
    config = folder / "tokenizer_config.json"
    fields = json.loads(config.read_text())
    (folder / "own.py").write_text("raise SystemExit('was run')\n")
    config.write_text(
        json.dumps({**fields, "tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own"] * 2}})
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    try:
        with pytest.raises(ValueError, match="custom code"):
            FlamingoProcessor.from_pretrained(folder)
        FlamingoForConditionalGeneration.from_pretrained(folder)
    finally:
        config.write_text(json.dumps(fields))


# -- pictures by name ----------------------------------------------------------------------


def encoded(form: str) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(held, form)
    return held.getvalue()


def data_uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


@pytest.fixture(scope="module")
def processor(folder: Path) -> FlamingoProcessor:
    return FlamingoProcessor.from_pretrained(folder)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[Callable[[bytes], str]]:
    """Address of a web server that hands these bytes out."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, directory=str(tmp_path), **kwargs)

        def log_message(self, *_) -> None:
            pass

    def put(data: bytes) -> str:
        (tmp_path / "picture").write_bytes(data)
        return f"http://127.0.0.1:{server.server_port}/picture"

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield put
        server.shutdown()


def test_a_picture_by_any_name_is_the_same(processor: FlamingoProcessor, address, tmp_path: Path):
    data = encoded("PNG")
    there = address(data)
    found = [processor(text=IMAGE, images=name)["pixel_values"] for name in (there, data_uri(data))]
    expected = processor(text=IMAGE, images=tmp_path / "picture")["pixel_values"]
    assert all((pixels == expected).all() for pixels in found)


@pytest.mark.parametrize("form", ["EPS", "PDF", "ICNS"])
def test_formats_that_start_programs_or_are_rare_are_refused_by_any_name(
    form: str, processor: FlamingoProcessor, address, tmp_path: Path
):
    data = encoded(form)
    for name in (address(data), data_uri(data), tmp_path / "picture"):
        with pytest.raises(ValueError, match="damaged image"):
            processor(text=IMAGE, images=name)


def test_what_cannot_be_fetched_or_read_is_one_error(processor: FlamingoProcessor, address, monkeypatch):
    there = address(encoded("PNG"))
    with pytest.raises(ValueError, match=r"nothing cannot be fetched: 404"):
        processor(text=IMAGE, images=there.replace("picture", "nothing"))
    with pytest.raises(ValueError, match="no base64"):
        processor(text=IMAGE, images="data:image/png;base64,abcde")
    monkeypatch.setattr("flamingo.processing.LARGEST", 10)
    with pytest.raises(ValueError, match="larger than"):
        processor(text=IMAGE, images=there)


# -- videos --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["mp4", "webm"])
def test_a_playlist_in_place_of_a_video_opens_nothing(form: str, address, tmp_path: Path):
    av = pytest.importorskip("av")
    from flamingo.data.errors import BadSample
    from flamingo.data.kinds import video

    segment = tmp_path / "segment.ts"
    with av.open(segment, "w", format="mpegts") as container:
        stream = container.add_stream("mpeg2video", rate=25)
        stream.width = stream.height = 64
        for _ in range(25):
            container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (64, 64), "red"))))
        container.mux(stream.encode())
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{segment}\n#EXT-X-ENDLIST\n".encode()
    with av.open(io.BytesIO(playlist), format="hls") as container:  # taken for what it is, it reads a file
        assert next(container.decode(video=0)).width == 64
    with pytest.raises(BadSample, match="damaged video"):
        video.read({form: playlist, "txt": b"a red picture"}, "1")


# -- the page ------------------------------------------------------------------------------


def test_the_page_names_files_and_tests_that_exist():
    words = set(re.findall(r"`([^`\n]+)`", (ROOT / "docs" / "security.md").read_text()))
    files = {word for word in words if re.fullmatch(r"(flamingo|train|eval|tests)/[\w/]+\.py", word)}
    named = {word for word in words if re.fullmatch(r"test_\w+", word)}
    texts = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(files) > 5 and [name for name in files if not (ROOT / name).is_file()] == []
    assert len(named) > 20 and [name for name in named if f"def {name}(" not in texts] == []
