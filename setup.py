"""All else is in pyproject.toml: this ships the CUDA source, which lies in csrc/, inside the package."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithSource(build_py):
    """Also puts `csrc/*.cu` into `kvsdk/kernels/csrc`, where an installed package looks for it."""

    def _cuda(self) -> dict[str, str]:
        if self.editable_mode:  # the source tree is where it is
            return {}
        target = Path(self.build_lib, "kvsdk", "kernels", "csrc")
        return {str(target / path.name): str(path) for path in sorted(Path("csrc").glob("*.cu"))}

    def run(self) -> None:
        super().run()
        for target, source in self._cuda().items():
            self.mkpath(str(Path(target).parent))
            self.copy_file(source, target)

    def get_output_mapping(self) -> dict[str, str]:
        return {**super().get_output_mapping(), **self._cuda()}

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *self._cuda()]

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *self._cuda().values()]


setup(cmdclass={"build_py": BuildWithSource})
