"""Carries out a Dockerfile's stages in real root directories, as `docker build` does with layers."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tests.image.context import Context
from tests.image.dockerfile import Dockerfile, DockerfileError, Instruction, Stage, expand
from tests.image.sandbox import Sandbox

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NETWORK = {each: Path(each) for each in ("/etc/resolv.conf", "/etc/hosts")}
"""Files by which programs find other machines."""


class BuildFailed(Exception):
    """A step of a Dockerfile failed; the message holds the step and what it printed."""


@dataclass(slots=True)
class Image:
    """A root directory, and how programs are started in it."""

    root: Path
    env: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    arguments: dict[str, str] = field(default_factory=dict)
    """ARGs that are known in this stage; no program but those of RUN sees them."""
    uid: int = 0
    gid: int = 0
    folder: str = "/"
    labels: dict[str, str] = field(default_factory=dict)
    volumes: list[str] = field(default_factory=list)
    ports: list[str] = field(default_factory=list)
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    health: tuple[str, ...] = ()
    health_flags: Mapping[str, str] = field(default_factory=dict)

    def inside(self, path: str) -> str:
        """An absolute path, of one that may be relative to the working directory."""
        return os.path.normpath(PurePosixPath(self.folder) / path)

    def place(self, path: str) -> Path:
        """Where an absolute path of the image lies on this machine; links on the way are those of the image."""
        place = self.root
        for part in PurePosixPath(path).parts[1:]:
            place = place / part
            if place.is_symlink():
                target = PurePosixPath(os.path.normpath(place.relative_to(self.root).parent / place.readlink()))
                place = self.root / (target.relative_to("/") if target.is_absolute() else target)
        return place

    def home(self) -> str:
        """The home directory of the user, as engines look it up."""
        for line in (self.root / "etc/passwd").read_text().splitlines():
            _, _, uid, _, _, home, _ = line.split(":")
            if int(uid) == self.uid:
                return home
        return "/"


class Build:
    """One run through a Dockerfile.

    Args:
        context: What COPY may take from the checkout.
        folder: An empty folder on whose file system the roots are made.
        base: Fills an empty folder with the root of the base image, whatever its name.
        variables: Further variables of RUN's programs, which leave no trace in the image (as an engine's proxies).
        mounts: What RUN's programs see besides, and where.
    """

    def __init__(
        self,
        context: Context,
        folder: Path,
        base: Callable[[Path], object],
        *,
        variables: Mapping[str, str],
        mounts: Mapping[str, Path],
    ) -> None:
        self._context = context
        self._folder = folder
        self._base = base
        self._variables = variables
        self._mounts = {**NETWORK, **mounts}
        self._stages: dict[str, Image] = {}
        self._do: dict[str, Callable[[Image, Instruction], None]] = {
            "ARG": self._arg,
            "CMD": self._cmd,
            "COPY": self._copy,
            "ENTRYPOINT": self._entrypoint,
            "ENV": self._env,
            "EXPOSE": self._expose,
            "HEALTHCHECK": self._healthcheck,
            "LABEL": self._label,
            "RUN": self._run,
            "USER": self._user,
            "VOLUME": self._volume,
            "WORKDIR": self._workdir,
        }

    def run(self, file: Dockerfile, arguments: Mapping[str, str] | None = None) -> Image:
        """Carry out every stage.

        Args:
            file: What to do.
            arguments: Values of ARGs, by name.

        Returns:
            The image of the last stage.

        Raises:
            BuildFailed: A program of a RUN failed.
            DockerfileError: A step cannot be carried out as it stands.
        """
        given = dict(arguments or {})
        outer = Image(self._folder)
        self._given = given
        self._outer: dict[str, str] = {}
        for instruction in file.arguments:
            self._arg(outer, instruction)
        self._outer = outer.arguments
        for number, stage in enumerate(file.stages):
            image = self._begin(stage, number)
            for instruction in stage.instructions:
                self._do[instruction.word](image, instruction)
            self._stages[str(number)] = image
            if stage.name is not None:
                self._stages[stage.name] = image
        return image

    def _begin(self, stage: Stage, number: int) -> Image:
        base = expand(stage.base, self._outer, Instruction(stage.line, "FROM", {}, stage.base))
        if base in self._stages:
            raise DockerfileError(f"line {stage.line}: FROM: stages upon stages are not known here")
        root = self._folder / f"stage-{number}"
        root.mkdir()
        root.chmod(0o755)
        self._base(root)
        return Image(root)

    # ------------------------------------------------------------------------------------------ what changes the root

    def _run(self, image: Image, step: Instruction) -> None:
        known = {"HOME": image.home(), **self._variables, **image.arguments, **image.env}
        sandbox = Sandbox(image.root, image.uid, image.gid, image.folder, writable=True, mounts=self._mounts)
        done = subprocess.run(
            sandbox.command(step.command()),
            env=known,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            raise BuildFailed(f"line {step.line}: RUN {step.text}: ended with {done.returncode}\n{done.stdout[-5000:]}")

    def _copy(self, image: Image, step: Instruction) -> None:
        words = step.words()
        if step.text.startswith("[") or len(words) < 2:
            raise step.error("sources and a destination are needed, as plain words")
        *sources, last = (self._put_in(word, image, step) for word in words)
        as_folder = last.endswith("/") or last == "." or len(sources) > 1
        if len(sources) > 1 and not last.endswith("/"):
            raise step.error("of several sources the destination must end with /")
        target = image.place(image.inside(last))
        whose = step.flags.get("from")
        if whose is not None and whose not in self._stages:
            raise step.error(f"there is no stage {whose!r} before this one")
        for source in sources:
            if whose is not None:
                self._copy_tree(self._stages[whose].place(source), target, as_folder=as_folder)
            else:
                self._copy_context(source, target, step, as_folder=as_folder)
        self._adjust(target, step)

    def _copy_tree(self, source: Path, target: Path, *, as_folder: bool) -> None:
        """A stage's file, or what is in its folder; links stay links."""
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
            return
        if as_folder:
            target = target / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target, follow_symlinks=False)

    def _copy_context(self, source: str, target: Path, step: Instruction, *, as_folder: bool) -> None:
        files = list(self._context.files(source))
        if not files:
            raise step.error(f"{source!r} is not in the build's context; see .dockerignore")
        whole = (self._context.folder / source).is_dir()
        for path in files:
            inner = path.relative_to(source) if whole else PurePosixPath(path.name if as_folder else "")
            place = target / inner
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self._context.folder / path, place)
            if os.geteuid() == 0:
                os.chown(place, 0, 0)  # whoever owns the checkout

    def _adjust(self, target: Path, step: Instruction) -> None:
        """Give what was copied the owner and mode that the flags name."""
        chown, chmod = step.flags.get("chown"), step.flags.get("chmod")
        for place in [target, *target.rglob("*")] if chown or chmod else []:
            if chown:
                uid, _, gid = chown.partition(":")
                os.chown(place, int(uid), int(gid or uid), follow_symlinks=False)
            if chmod and not place.is_symlink():
                place.chmod(int(chmod, 8))

    def _workdir(self, image: Image, step: Instruction) -> None:
        image.folder = image.inside(self._put_in(step.text, image, step))
        image.place(image.folder).mkdir(parents=True, exist_ok=True)

    # ------------------------------------------------------------------------------------------ what is only noted

    def _arg(self, image: Image, step: Instruction) -> None:
        name, equals, value = step.text.partition("=")
        if not name.isidentifier():
            raise step.error(f"{step.text!r} is neither name nor name=default")
        default = self._put_in(value, image, step).strip('"') if equals else self._outer.get(name, "")
        image.arguments[name] = self._given.get(name, default)

    def _env(self, image: Image, step: Instruction) -> None:
        known = {**image.arguments, **image.env}  # of one ENV all see what was before it
        image.env |= {name: expand(value, known, step) for name, value in step.pairs()}

    def _label(self, image: Image, step: Instruction) -> None:
        image.labels |= {name: self._put_in(value, image, step) for name, value in step.pairs()}

    def _user(self, image: Image, step: Instruction) -> None:
        uid, _, gid = self._put_in(step.text, image, step).partition(":")
        if not (uid.isdigit() and (gid or uid).isdigit()):
            raise step.error("users and groups are given by number, so that a kubelet can tell that none is root")
        image.uid, image.gid = int(uid), int(gid or 0)

    def _volume(self, image: Image, step: Instruction) -> None:
        image.volumes += [self._put_in(word, image, step) for word in step.words()]

    def _expose(self, image: Image, step: Instruction) -> None:
        image.ports += [self._put_in(word, image, step) for word in step.words()]

    def _entrypoint(self, image: Image, step: Instruction) -> None:
        image.entrypoint, image.command = step.command(), ()

    def _cmd(self, image: Image, step: Instruction) -> None:
        image.command = step.command()

    def _healthcheck(self, image: Image, step: Instruction) -> None:
        word, _, rest = step.text.partition(" ")
        if word != "CMD" or not rest.strip():
            raise step.error("only HEALTHCHECK CMD … is known")
        image.health = Instruction(step.line, step.word, {}, rest.strip()).command()
        image.health_flags = step.flags

    def _put_in(self, text: str, image: Image, step: Instruction) -> str:
        return expand(text, {**image.arguments, **image.env}, step)


def started(image: Image, extra: Sequence[str] = ()) -> tuple[str, ...]:
    """The program that an engine starts; `extra` takes the place of CMD, as the words after the image's name do."""
    return (*image.entrypoint, *(extra or image.command))
