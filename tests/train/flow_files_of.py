"""Pairs of frames and their flow as the public data sets lay them out."""

from PIL import Image

from mmkernels.train.data import flow_files

LAYOUTS = {
    "sintel": ("clean/alley_{}/frame_0009.png", "clean/alley_{}/frame_0010.png", "flow/alley_{}/frame_0009.flo"),
    "kitti": ("image_2/00000{}_10.png", "image_2/00000{}_11.png", "flow_occ/00000{}_10.png"),
    "chairs": ("0000{}_img1.ppm", "0000{}_img2.ppm", "0000{}_flow.flo"),
}


def write_pair(folder, frames, flow, layout, number=0):
    """Paths of both frames (2, H, W, 3) in [-1, 1], and of their flow (H, W, 2)."""
    paths = [folder / name.format(number) for name in LAYOUTS[layout]]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    for path, frame in zip(paths, frames, strict=False):
        Image.fromarray(((frame + 1) * 127.5).byte().numpy()).save(path)
    (flow_files.write_kitti if layout == "kitti" else flow_files.write_flo)(paths[2], flow)
    return paths
