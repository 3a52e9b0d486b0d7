"""Plants every fault of tests/planted/faults in a copy of the sources and builds the simulations there, once: which fault
is at work is chosen when a simulation runs (JWKSD_PLANTED). tests/planted.rs runs them.

    plant.py WORKSPACE    lays out WORKSPACE/jwksd and builds it; the list of what was built is WORKSPACE/built.json
"""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent

CHOICE = '''//! Which of the planted faults is at work: `JWKSD_PLANTED` names it.

pub const ALL: [&str; {count}] = [
{names}
];

pub fn is(fault: &str) -> bool {{
    static CHOSEN: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    let chosen = CHOSEN.get_or_init(|| {{
        let chosen = std::env::var("JWKSD_PLANTED").ok()?;
        assert!(ALL.contains(&chosen.as_str()), "no fault {{chosen}} is planted: run tests/run");
        Some(chosen)
    }});
    chosen.as_deref() == Some(fault)
}}
'''


def main(workspace: Path) -> None:
    faults = {path.stem: tomllib.loads(path.read_text()) for path in sorted((HERE / "faults").glob("*.toml"))}
    package = workspace / "jwksd"
    files = {path: path.read_bytes() for path in sources()}
    plant(faults, files)
    names = "\n".join(f'    "{name}",' for name in faults)
    files[REPOSITORY / "src/planted.rs"] = CHOICE.format(count=len(faults), names=names).encode()
    files[REPOSITORY / "src/lib.rs"] += b"pub mod planted;\n"
    manifest = REPOSITORY / "Cargo.toml"
    cargo = tables(manifest.read_text())
    # Without the program, which no simulation needs; and what a fault leaves unused is no mistake here.
    own = "".join(text for name, text in cargo if not name.startswith(("profile", "lints")))
    own = own.replace('default-run = "jwksd"\n', "autobins = false\n")
    files[manifest] = (own + '[lints.rust]\nunused = "allow"\n').encode()
    lay_out({package / path.relative_to(REPOSITORY): content for path, content in files.items()}, package)
    # A member of another workspace is another package to cargo; this one's profiles let it share the dependencies.
    profiles = "".join(text for name, text in cargo if name.startswith("profile"))
    write(workspace / "Cargo.toml", ('[workspace]\nmembers = ["jwksd"]\nresolver = "3"\n\n' + profiles).encode())
    shutil.copyfile(REPOSITORY / "Cargo.lock", workspace / "Cargo.lock")
    tests = sorted({found["in"] for fault in faults.values() for found in fault["found"]})
    (workspace / "built.json").write_text(json.dumps(build(workspace, tests), indent=1) + "\n")


def sources() -> list[Path]:
    """What the simulations are built from."""
    found = [path for folder in ("src", "config", "tests") for path in (REPOSITORY / folder).rglob("*")]
    return [path for path in found if path.is_file() and HERE not in path.parents]


def plant(faults: dict, files: dict[Path, bytes]) -> None:
    """Makes every edit of every fault, each of which has to fit the sources as they are."""
    edits: dict[Path, list] = {}
    for name, fault in faults.items():
        if not any(f'planted::is("{name}")' in edit["new"] for edit in fault["edit"]):
            sys.exit(f"{name}: no edit asks whether it is at work")
        for edit in fault["edit"]:
            path = REPOSITORY / edit["file"]
            text, old = files.get(path, b"").decode(), edit["old"]
            if text.count(old) != 1:
                sys.exit(f"{name}: what it replaces stands {text.count(old)} times in {edit['file']}, not once:\n{old}")
            at = text.index(old)
            edits.setdefault(path, []).append((at, at + len(old), edit["new"], name))
    for path, list_ in edits.items():
        list_.sort()
        for (_, end, _, one), (begin, _, _, other) in zip(list_, list_[1:]):
            if begin < end:
                sys.exit(f"{one} and {other} replace the same lines of {path.relative_to(REPOSITORY)}")
        text = files[path].decode()
        for begin, end, new, _ in reversed(list_):
            text = text[:begin] + new + text[end:]
        files[path] = text.encode()


def tables(manifest: str) -> list[tuple[str, str]]:
    """The tables of a manifest as they are written, each with its name."""
    found: list[tuple[str, str]] = []
    for line in manifest.splitlines(keepends=True):
        if line.startswith("["):
            found.append((line.strip("[]\n"), ""))
        if found:
            name, text = found[-1]
            found[-1] = (name, text + line)
    return found


def lay_out(files: dict[Path, bytes], package: Path) -> None:
    """Writes what differs alone, so that cargo compiles no more than it has to."""
    for path, content in files.items():
        write(path, content)
    for path in package.rglob("*"):
        if path.is_file() and path not in files:
            path.unlink()


def write(path: Path, content: bytes) -> None:
    if path.is_file() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def build(workspace: Path, tests: list[str]) -> dict[str, str]:
    """Builds the simulations and returns where each one is."""
    command = ["cargo", "test", "--locked", "--no-run", "--message-format=json-render-diagnostics"]
    command += ["--manifest-path", str(workspace / "Cargo.toml"), "--package", "jwksd"]
    command += [argument for test in tests for argument in ("--test", test)]
    environment = os.environ | {"CARGO_TARGET_DIR": os.environ.get("CARGO_TARGET_DIR", str(REPOSITORY / "target"))}
    built = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=workspace)
    if built.returncode != 0:
        sys.exit("the simulations with planted faults do not build")
    messages = [json.loads(line) for line in built.stdout.splitlines() if line.startswith("{")]
    artifacts = [message for message in messages if message["reason"] == "compiler-artifact" and message["executable"]]
    return {artifact["target"]["name"]: artifact["executable"] for artifact in artifacts}


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
