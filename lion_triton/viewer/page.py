"""The page: a scene of clouds and meshes, a panel, and one piece of work at a time. All is served from this machine."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout

import numpy as np
import trimesh
import viser
from jaxtyping import Float32

from lion_triton.pictures import RIGHT, TOWARDS, balls


class Page:
    """A page at http://127.0.0.1:PORT, or the next free port."""

    def __init__(self, port: int) -> None:
        with redirect_stdout(io.StringIO()):  # it prints the address, verbose or not
            self.server = viser.ViserServer(host="127.0.0.1", port=port, verbose=False)
        self.server.gui.configure_theme(show_logo=False, show_share_button=False)
        self.server.scene.set_up_direction("+y")
        self.status = self.server.gui.add_markdown("")
        self._busy = threading.Lock()
        self._buttons: list[viser.GuiButtonHandle] = []
        self.file: tuple[str, bytes] = ("", b"")  # name and content of what the download button gives

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.get_port()}"

    def show_cloud(self, name: str, points: Float32[np.ndarray, "P 3"], left: float = 0.0) -> None:
        """Draw a cloud in place of the one called ``name``, so far to the left of its place."""
        radius, colours = balls(points)
        self.server.scene.add_point_cloud(
            f"/{name}",
            points,
            colours,
            point_size=radius,
            point_shape="circle",
            precision="float32",
            position=-left * RIGHT,
        )

    def show_mesh(self, name: str, mesh: trimesh.Trimesh) -> None:
        """Draw a mesh in place of what is called ``name``."""
        self.server.scene.add_mesh_trimesh(f"/{name}", mesh)

    def remove(self, name: str) -> None:
        """Take away what is called ``name``, if anything is."""
        self.server.scene.remove_by_name(f"/{name}")

    def look_at(self, points: Float32[np.ndarray, "P 3"]) -> None:
        """Where a new visitor's camera stands: before these points, from the upper right."""
        low, high = points.min(0), points.max(0)
        center, camera = (low + high) / 2, self.server.initial_camera
        camera.look_at = center
        camera.position = center + 1.6 * float(np.linalg.norm(high - low) or 1) * TOWARDS

    def offer(self, name: str, geometry: trimesh.Trimesh | trimesh.PointCloud) -> None:
        """What the download button gives, as a .ply."""
        file = io.BytesIO()
        geometry.export(file, file_type="ply")
        self.file = (f"{name}.ply", file.getvalue())

    def add_download(self) -> None:
        button = self.server.gui.add_button("Download .ply")

        @button.on_click
        def _(event: viser.GuiEvent[viser.GuiButtonHandle]) -> None:
            if event.client is not None:
                event.client.send_file_download(*self.file)

    def add_action(self, label: str, work: Callable[[], str]) -> None:
        """A button; ``work`` returns what is then said. While it works no other button does."""
        button = self.server.gui.add_button(label)
        self._buttons.append(button)
        button.on_click(lambda _: self.do(label, work))

    def do(self, label: str, work: Callable[[], str]) -> None:
        """One piece of work after the other; what it returns is said, or its error."""
        with self._busy:
            for button in self._buttons:
                button.disabled = True
            self.say(f"{label} ...")
            try:
                self.say(work())
            except ValueError as error:
                self.say(f"**{error}**")
            except Exception as error:
                self.say(f"**{type(error).__name__}: {error}**")
                raise
            finally:
                for button in self._buttons:
                    button.disabled = False

    def say(self, text: str) -> None:
        self.status.content = text

    def progress(self, label: str) -> Callable[[float, float], None]:
        """Tells the visitor how far a piece of work is, at most five times a second."""
        last = 0.0

        def advance(done: float, total: float) -> None:
            nonlocal last
            if time.monotonic() - last > 0.2:
                last = time.monotonic()
                self.say(f"{label}: {done / total:.0%}")

        return advance
