"""Small files to read: sound by the standard library, videos by FFmpeg."""

import wave

import torch


def write_wav(path, channels, rate):
    """`channels`: float (channels, samples) in [-1, 1], as 16 bit."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(channels))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((channels.T * 32767).round().short().contiguous().numpy().tobytes())
    return path


def tone(frequency, seconds, rate, amplitude=0.5):
    return amplitude * torch.sin(2 * torch.pi * frequency * torch.arange(int(seconds * rate)) / rate)


def write_video(path, frames, fps, key_every=5):
    """`frames`: uint8 (n, h, w, 3); .mkv is lossless, .mp4 is not."""
    import av

    lossless = path.suffix == ".mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1" if lossless else "mpeg4", rate=fps)
        stream.width, stream.height = frames.shape[2], frames.shape[1]
        stream.pix_fmt = "bgr0" if lossless else "yuv420p"
        stream.bit_rate = 8_000_000
        stream.codec_context.gop_size = key_every
        for pixels in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels.numpy(), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def numbered(count, height=12, width=16):
    """Frames whose red is 10 times their number, with a white left half of the blue channel."""
    frames = torch.zeros(count, height, width, 3, dtype=torch.uint8)
    frames[..., 0] = 10 * torch.arange(count)[:, None, None]
    frames[:, :, : width // 2, 2] = 255
    return frames
