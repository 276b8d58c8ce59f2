"""Coarser meshes, for pictures that are too small to show the difference."""

from copy import copy

import mujoco
import numpy as np


def coarser(model: mujoco.MjModel, geoms: np.ndarray, cell: float) -> mujoco.MjModel:
    """A model to draw, in which the corners of meshes that lie in one cube are one corner.

    Software rendering takes as long as there are triangles, most of which a small picture does not show. The
    copy is for a renderer alone: with meshes that collide, its physics is another.

    Args:
        geoms: which geoms' meshes, (ngeom,) bool.
        cell: the cube's edge in metres.
    """
    model = copy(model)
    for mesh in np.unique(model.geom_dataid[geoms & (model.geom_type == mujoco.mjtGeom.mjGEOM_MESH)]):
        corners = slice(model.mesh_vertadr[mesh], model.mesh_vertadr[mesh] + model.mesh_vertnum[mesh])
        points = model.mesh_vert[corners]
        _, cube, size = np.unique(np.round(points / cell), axis=0, return_inverse=True, return_counts=True)
        cube = cube.reshape(-1)
        centres = np.stack([np.bincount(cube, points[:, axis]) for axis in range(3)], 1) / size[:, None]
        first, count = model.mesh_faceadr[mesh], model.mesh_facenum[mesh]
        faces = cube[model.mesh_face[first : first + count]]
        solid = np.flatnonzero((faces != np.roll(faces, 1, axis=1)).all(axis=1))
        _, single = np.unique(np.sort(faces[solid], axis=1), axis=0, return_index=True)
        kept = first + solid[np.sort(single)]
        model.mesh_vert[corners] = centres[cube]
        for part in (model.mesh_face, model.mesh_facenormal, model.mesh_facetexcoord):
            part[first : first + len(kept)] = part[kept]
        model.mesh_facenum[mesh] = len(kept)
    return model
