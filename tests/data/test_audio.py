"""Decoding: samples identical to the published ones; files that are damaged or not audio."""

import errno
import functools
import io
import re
import struct
import sys
from unittest import mock

from input_data import read_clips
from toolkit.data import audio
from toolkit.data.audio import cut_pieces, cut_segments, decode, decode_pieces, segments_per_part
from toolkit.errors import AudioError, UsageError

import av
import numpy as np
import pytest
from conftest import (
    add_picture,
    encode_audio,
    encode_float,
    needs_proc,
    opened,
    run_python,
    synthesise,
    wrecked,
)
from hypothesis import example, given
from hypothesis import strategies as st

SAMPLE_RATE = 22050
NUM_SAMPLES = 59049


def id3_picture():
    """Make an ID3v2.3 tag with a cover picture."""
    body = b"\0image/png\0\3\0" + b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8
    frame = b"APIC" + len(body).to_bytes(4, "big") + b"\0\0" + body
    size = bytes(len(frame) >> shift & 127 for shift in (21, 14, 7, 0))
    return b"ID3\3\0\0" + size + frame


@pytest.fixture(scope="module")
def mp3(tmp_path_factory):
    """Encode a clip of 5 seconds in MagnaTagATune's format."""
    return encode_audio(tmp_path_factory.mktemp("audio") / "clip.mp3", synthesise(5))


# --- The published program's samples ------------------------------------------------------------


@pytest.mark.parametrize(
    ("clip", "shard"),
    [
        ("gm-pop-01-take-0-29.mp3", "train-0000-of-0001.tfrecord"),
        ("gm-choir-01-take-0-29.mp3", "test-0000-of-0001.seq.tfrecord"),
    ],
)
def test_samples_equal_those_of_the_published_program(golden, clip, shard):
    expected = np.concatenate([c.segments for c in read_clips([golden / "tfrecord" / shard])])
    samples = decode(golden / "clips" / clip)
    assert samples.dtype == np.float32
    assert samples.shape == (29 * SAMPLE_RATE,)
    np.testing.assert_array_equal(cut_segments(samples, NUM_SAMPLES), expected)


@functools.cache
def madmom_is_missing():
    try:
        audio.import_madmom()
    except UsageError:
        return True
    return False


def assert_same_as_madmom(path, tolerance=0):
    if madmom_is_missing():
        pytest.skip("madmom is not installed")
    samples, reference = decode(path), decode(path, decoder="madmom")
    assert samples.dtype == reference.dtype == np.float32
    assert samples.shape == reference.shape
    assert np.ptp(samples) > 0.01
    np.testing.assert_allclose(samples, reference, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "sample_rate", "channels", "seconds", "codec", "bit_rate"),
    [
        ("clip.mp3", 16000, 1, 30, "libmp3lame", 32000),
        ("stereo-44k.mp3", 44100, 2, 7.3, "libmp3lame", 128000),
        ("no-resampling.wav", 22050, 1, 3, "pcm_s16le", None),
        ("8k.wav", 8000, 1, 3, "pcm_s16le", None),
        ("96k-surround.wav", 96000, 6, 3, "pcm_s16le", None),
        ("stereo.flac", 48000, 2, 7.3, "flac", None),
    ],
)
def test_equals_madmom(tmp_path, name, sample_rate, channels, seconds, codec, bit_rate):
    samples = synthesise(seconds, sample_rate, channels, tags=(0, 4))
    assert_same_as_madmom(encode_audio(tmp_path / name, samples, sample_rate, codec, bit_rate))


def test_equals_madmom_on_an_mp3_with_a_cover(tmp_path, mp3):
    path = tmp_path / "cover.mp3"
    path.write_bytes(id3_picture() + mp3.read_bytes())
    assert_same_as_madmom(path)
    np.testing.assert_array_equal(decode(path), decode(mp3))


@pytest.mark.parametrize(("name", "codec"), [("a.ogg", "vorbis"), ("a.m4a", "aac")])
def test_nearly_equals_madmom_where_releases_of_ffmpeg_differ(tmp_path, name, codec):
    # The decoders of Vorbis and AAC add floats in an order that depends on the release of FFmpeg.
    # 2**-24 is the last bit of a sample. Both channels are equal, because FFmpeg 5 decodes some
    # coupled channels wrongly.
    assert_same_as_madmom(encode_float(tmp_path / name, codec), tolerance=2**-22)


def damaged(content):
    """Overwrite about three frames of an MP3 with noise."""
    start = len(content) // 3
    noise = np.random.default_rng(0).bytes(500)
    return content[:start] + noise + content[start + len(noise) :]


def test_damaged_frames_are_skipped_as_by_madmom(tmp_path):
    sound = encode_audio(tmp_path / "sound.mp3", synthesise(30))
    path = tmp_path / "damaged.mp3"
    path.write_bytes(damaged(sound.read_bytes()))
    samples = decode(path)
    assert samples.shape == (29 * SAMPLE_RATE,)
    assert not np.array_equal(samples, decode(sound))
    if madmom_is_missing():
        pytest.skip("madmom is not installed")
    # For madmom, lost frames count towards the 29 s, so madmom returns fewer samples.
    reference = decode(path, decoder="madmom")
    assert 29 * SAMPLE_RATE - 5 * 800 < len(reference) <= len(samples)
    np.testing.assert_array_equal(samples[: len(reference)], reference)


# --- Options, pieces and levels -------------------------------------------------------------------


def test_stop_and_sample_rate(mp3):
    whole = decode(mp3, stop=None)
    assert 5 * SAMPLE_RATE <= len(whole) < 5.2 * SAMPLE_RATE
    np.testing.assert_array_equal(decode(mp3, stop=2.0), whole[: 2 * SAMPLE_RATE])
    assert len(decode(mp3, sample_rate=16000, stop=2.0)) == 32000
    assert len(decode(mp3, sample_rate=44100, stop=2.0)) == 88200


@pytest.mark.parametrize(
    ("name", "sample_rate", "channels", "codec"),
    [
        ("a.mp3", 44100, 2, "libmp3lame"),
        ("a.wav", 22050, 1, "pcm_s16le"),
        ("a.wav", 96000, 6, "pcm_s16le"),
        ("a.flac", 8000, 2, "flac"),
    ],
)
@pytest.mark.parametrize("num_gathered", [1, 10_000])
def test_resampling_in_pieces_returns_the_same_samples(
    tmp_path, monkeypatch, name, sample_rate, channels, codec, num_gathered
):
    bit_rate = 64000 if codec == "libmp3lame" else None
    samples = synthesise(5, sample_rate, channels)
    path = encode_audio(tmp_path / name, samples, sample_rate, codec, bit_rate)
    for stop in (None, 4.7, 29.0):
        monkeypatch.setattr(audio, "_GATHERED_SAMPLES", 1 << 30)
        whole = decode(path, stop=stop)
        monkeypatch.setattr(audio, "_GATHERED_SAMPLES", num_gathered)
        pieces = list(decode_pieces(path, stop=stop))
        assert min(map(len, pieces)) > 0
        assert len(pieces) > 1 or num_gathered >= len(samples)
        np.testing.assert_array_equal(np.concatenate(pieces), whole)
        np.testing.assert_array_equal(decode(path, stop=stop), whole)


@pytest.mark.parametrize("difference", [-1, 0, 1])
@pytest.mark.parametrize("num_pieces", [1, 2, 3])
def test_file_that_ends_near_the_end_of_a_piece_is_complete(tmp_path, num_pieces, difference):
    num_samples = num_pieces * audio._GATHERED_SAMPLES + difference
    samples = synthesise(num_samples / SAMPLE_RATE, SAMPLE_RATE)
    path = encode_audio(tmp_path / "a.wav", samples, SAMPLE_RATE, "pcm_s16le", None)
    found = np.concatenate(list(decode_pieces(path, stop=None)))
    np.testing.assert_array_equal(found, samples[:, 0] / np.float32(32768))


def test_damage_late_in_a_file_is_raised_after_the_intact_pieces(tmp_path, mp3):
    path = tmp_path / "breaks.mp3"
    path.write_bytes(mp3.read_bytes() * 4 + wrecked(mp3.read_bytes()) * 12)
    pieces = decode_pieces(path, stop=None)
    np.testing.assert_array_equal(next(pieces)[:SAMPLE_RATE], decode(mp3)[:SAMPLE_RATE])
    with pytest.raises(AudioError, match=r"breaks\.mp3: \d+ of \d+ audio packets are damaged"):
        list(pieces)
    with pytest.raises(AudioError, match="packets are damaged"):
        decode(path, stop=None)
    assert len(decode(path, stop=18)) == 18 * SAMPLE_RATE


@pytest.mark.parametrize(("channels", "level"), [(1, 0.5), (2, 0.5 * 2**0.5)])
def test_tone_keeps_its_pitch_and_level(tmp_path, channels, level):
    # Two channels are added at 1/sqrt(2) each, as in the published program.
    time = np.arange(3 * 44100) / 44100
    tone = np.round(16384 * np.sin(2 * np.pi * 1000 * time)).astype(np.int16)[:, np.newaxis]
    tone = np.repeat(tone, channels, axis=1)  # (n_samples, channels)
    samples = decode(encode_audio(tmp_path / "tone.wav", tone, 44100, "pcm_s16le", None))
    spectrum = np.abs(np.fft.rfft(samples[:SAMPLE_RATE] * np.hanning(SAMPLE_RATE)))
    assert np.argmax(spectrum) == 1000
    np.testing.assert_allclose(np.abs(samples[1000:-1000]).max(), level, atol=0.005)


# --- Unusual files ------------------------------------------------------------------------------


def test_format_may_change_within_a_file(tmp_path, mp3):
    other = encode_audio(tmp_path / "other.mp3", synthesise(5, 44100, 2), 44100, bit_rate=128000)
    joined = tmp_path / "joined.mp3"
    joined.write_bytes(mp3.read_bytes() + other.read_bytes())
    samples = decode(joined)
    first = len(decode(mp3)) - 2000
    assert 9.5 * SAMPLE_RATE < len(samples) < 10.5 * SAMPLE_RATE
    np.testing.assert_array_equal(samples[:first], decode(mp3)[:first])


_HELD = """if True:
    import sys
    from pathlib import Path
    from toolkit.data.audio import decode

    def held():
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

    decode(sys.argv[1])
    before = held()
    print(len(decode(sys.argv[2])), held() - before)
"""


@needs_proc
def test_three_hours_need_no_more_memory_than_29_s(tmp_path):
    short = encode_audio(tmp_path / "short.mp3", synthesise(30))
    hours = tmp_path / "hours.mp3"
    hours.write_bytes(short.read_bytes() * 360)
    done = run_python("-c", _HELD, short, hours, timeout=30)
    assert done.returncode == 0, done.stderr
    num_samples, num_kilobytes = map(int, done.stdout.split())
    assert num_samples == 29 * SAMPLE_RATE
    assert num_kilobytes < 50_000


def test_unusual_names_and_comments_are_accepted(tmp_path, mp3, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = decode(mp3)
    for name in ("a:b.mp3", "100%d.mp3", "-f.mp3", "dÄmmerung.mp3", "a\udce9.mp3", "a b?.mp3"):
        (tmp_path / name).write_bytes(mp3.read_bytes())
        np.testing.assert_array_equal(decode(name), expected)

    wav = encode_audio(tmp_path / "a.wav", synthesise(1), 16000, "pcm_s16le", None).read_bytes()
    tagged = wav + b"LIST\x10\0\0\0INFOIART\4\0\0\0\xe9\xe8\xff\0"  # an artist in Latin-1
    size = (len(tagged) - 8).to_bytes(4, "little")
    (tmp_path / "b.wav").write_bytes(tagged[:4] + size + tagged[8:])
    np.testing.assert_array_equal(decode("b.wav"), decode("a.wav"))


def not_audio(kind, folder):
    path = folder / f"{kind}.mp3"
    random = np.random.default_rng(0)
    content = {
        "noise": random.bytes(40_000),
        "null": bytes(40_000),
        "id3-only": id3_picture(),
        "one-header": b"\xff\xfb\x90\x64",
    }
    if kind in content:
        path.write_bytes(content[kind])
    elif kind == "folder":
        path.mkdir()
    elif kind == "video":
        path = path.with_suffix(".mp4")
        with av.open(str(path), "w") as container:
            add_picture(container)
    else:
        path = folder / ("a" * 300 + ".mp3")
    return path


# Builds of shards have tests of empty, missing and unreadable files, text, and a single sample.
_NOT_AUDIO = "folder long-name noise null id3-only one-header video"


@pytest.mark.parametrize("kind", _NOT_AUDIO.split())
def test_file_without_audio_is_refused_by_name(tmp_path, kind):
    path = not_audio(kind, tmp_path)
    with pytest.raises(AudioError) as caught:
        decode(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_sample_is_audio(tmp_path):
    one = np.array([[16384]], np.int16)
    path = encode_audio(tmp_path / "one.wav", one, SAMPLE_RATE, "pcm_s16le", None)
    np.testing.assert_array_equal(decode(path), [0.5])


def bursts(content, every=2000, size=300):
    """Overwrite parts of the middle third of a file with noise."""
    content, random = bytearray(content), np.random.default_rng(7)
    for start in range(len(content) // 3, 2 * len(content) // 3, every):
        content[start : start + size] = random.bytes(size)
    return bytes(content)


def test_damaged_packets_are_skipped_whatever_error_the_decoder_returns(tmp_path):
    path = encode_float(tmp_path / "burst.eac3", "eac3", seconds=6)
    path.write_bytes(bursts(path.read_bytes()))
    errors = set()
    with av.open(str(path)) as container:
        for packet in container.demux(audio=0):
            try:
                packet.decode()
            except av.error.FFmpegError as error:
                errors.add(type(error))
    assert errors - {av.error.InvalidDataError}
    assert 5 * SAMPLE_RATE < len(decode(path)) <= 6.1 * SAMPLE_RATE


def ogg_page(page, number, content=None):
    """Return an Ogg page with another number, possibly another content, and its checksum."""
    if content is not None:
        page = page[:26] + bytes([1, len(content)]) + content
    page = page[:18] + number.to_bytes(4, "little") + bytes(4) + page[26:]
    checksum = 0
    for byte in page:
        checksum ^= byte << 24
        for _ in range(8):
            checksum = (checksum << 1 ^ (0x04C11DB7 if checksum >> 31 else 0)) & 0xFFFFFFFF
    return page[:22] + checksum.to_bytes(4, "little") + page[26:]


def with_empty_packet(content, share):
    """Insert a packet of no bytes into an Ogg file, at which reading fails."""
    pages = [b"OggS" + page for page in content.split(b"OggS")[1:]]
    at = round(share * len(pages))
    pages.insert(at, ogg_page(pages[at - 1], at, b""))
    return b"".join(ogg_page(page, number) for number, page in enumerate(pages))


def test_file_that_breaks_off_is_kept_from_a_third_of_what_is_used(tmp_path):
    samples = synthesise(9, 48000)
    whole = encode_audio(tmp_path / "a.opus", samples, 48000, "libopus", 64000, page_duration="1")
    path = tmp_path / "breaks.opus"
    for share, stop in ((0.5, None), (0.2, 4.0)):
        path.write_bytes(with_empty_packet(whole.read_bytes(), share))
        found = decode(path, stop=stop)
        assert len(found) > 0.7 * share * 9 * SAMPLE_RATE
        num_equal = len(found) - 20  # the resampler's filter looks ahead
        np.testing.assert_array_equal(found[:num_equal], decode(whole)[:num_equal])
    reason = r"breaks\.opus: breaks off after 1\.\d s of 9\.0 s: Invalid data"
    with pytest.raises(AudioError, match=reason):
        decode(path, stop=None)


def test_new_stream_within_a_file_ends_it(tmp_path):
    parts = []
    for number in (256, 300):
        options = {"mpegts_start_pid": str(number), "mpegts_pmt_start_pid": str(number + 4096)}
        part = tmp_path / f"{number}.ts"
        parts.append(encode_audio(part, synthesise(4, 48000), 48000, "mp2", 64000, **options))
    path = tmp_path / "a.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    np.testing.assert_array_equal(decode(path), decode(parts[0]))


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()])
def test_failures_of_the_machine_are_not_those_of_a_file(mp3, monkeypatch, error):
    reads = []

    def read(file, size):
        reads.append(size)
        if len(reads) > 2:
            raise error
        return io.FileIO.read(file, size)

    monkeypatch.setattr(audio._File, "read", read)
    with pytest.raises(type(error)):
        decode(mp3)


def test_error_codes_without_a_text_are_put_into_words(mp3, monkeypatch):
    error = av.error.UndefinedError(16976906, "Error number -16976906 occurred")
    monkeypatch.setattr(av, "open", mock.Mock(side_effect=error))
    with pytest.raises(AudioError, match="cannot be decoded: unknown error of the decoding lib"):
        decode(mp3)


@pytest.mark.parametrize("name", ["a.m3u8", "a.ffconcat", "a.mp3", "id3.mp3", "id3.m3u8", "a.idx"])
def test_playlists_are_refused_and_open_no_file(tmp_path, name, mp3):
    outside = tmp_path / "outside.mp3"
    outside.write_bytes(mp3.read_bytes())
    text = f"#EXTM3U\n#EXT-X-TARGETDURATION:6\n#EXTINF:6,\n{outside}\n#EXT-X-ENDLIST\n"
    if name == "a.ffconcat":
        text = f"ffconcat version 1.0\nfile {outside}\n"
    elif name == "a.idx":  # VobSub reads a file of the same name
        text = "# VobSub index file, v7\nid: en\ntimestamp: 00:00:01:101, filepos: 000000000\n"
        outside = outside.rename(tmp_path / "a.sub")
    id3 = b"ID3\4\0\0\0\0\0\4\0\0\0\0" if name.startswith("id3") else b""
    (tmp_path / name).write_bytes(id3 + text.encode())
    with opened(outside) as was_opened:
        with pytest.raises(AudioError, match=re.escape(name)):
            decode(tmp_path / name)
        assert not was_opened()


def write_wav(path, samples, sample_rate=SAMPLE_RATE):
    """Write float samples [shape=(n_samples, channels)], which may have any value."""
    bits, channels = 8 * samples.itemsize, samples.shape[1]
    content, frame = samples.tobytes(), samples.itemsize * channels
    form = struct.pack("<HHIIHH", 3, channels, sample_rate, sample_rate * frame, frame, bits)
    chunks = [(b"fmt ", form), (b"data", content)]
    body = b"WAVE" + b"".join(name + len(c).to_bytes(4, "little") + c for name, c in chunks)
    path.write_bytes(b"RIFF" + len(body).to_bytes(4, "little") + body)
    return path


@pytest.mark.parametrize(
    ("channels", "kind", "value", "what"),
    [
        (1, np.float32, np.nan, "NaN"),
        (2, np.float64, -np.inf, "-infinity"),
        (1, np.float64, 1e29, r"1e\+29, beyond 100 times full scale"),
        (2, np.float32, -101, "-101, beyond 100 times full scale"),
    ],
)
def test_samples_that_cannot_be_audio_are_refused(tmp_path, channels, kind, value, what):
    samples = np.full((80_000, channels), 100, kind)  # the largest value that is accepted
    path = write_wav(tmp_path / "odd.wav", samples)
    assert len(decode(path)) == 80_000
    samples[:] = 0.5
    samples[70_000:70_010, -1] = value
    write_wav(path, samples)
    with pytest.raises(AudioError, match=rf"odd\.wav: sample 70000 \(3\.17 s\) is {what}$"):
        decode(path)
    if channels == 1 and not madmom_is_missing():  # madmom returns the mean of channels
        with pytest.raises(AudioError, match=r"odd\.wav: sample 70000 \(3\.17 s\) is "):
            decode(path, decoder="madmom")


@pytest.mark.parametrize("seed", range(12))
def test_any_damage_returns_samples_or_raises_an_audio_error(tmp_path, mp3, seed):
    random = np.random.default_rng(seed)
    suffix, codec = [(".mp3", "libmp3lame"), (".wav", "pcm_s16le"), (".flac", "flac")][seed % 3]
    whole = encode_audio(tmp_path / f"whole{suffix}", synthesise(2), codec=codec)
    for trial in range(6):
        content = bytearray(whole.read_bytes())
        for _ in range(random.integers(1, 30)):
            # Change the headers at the start as often as the rest of the file.
            place = int(random.integers(len(content)) ** random.uniform(0.3, 1))
            content[place : place + 3] = random.bytes(random.integers(0, 6))
        path = tmp_path / f"{trial}{suffix}"
        path.write_bytes(content[: random.integers(len(content) // 2, len(content) + 1)])
        try:
            samples = decode(path)
        except AudioError as error:
            assert str(path) in str(error)
        else:
            assert samples.dtype == np.float32
            assert 0 < len(samples) <= 29 * SAMPLE_RATE


# --- Segments -------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(0, 90), max_size=12),
    num_samples=st.integers(1, 40),
    hop=st.one_of(st.none(), st.integers(1, 90)),
    part_samples=st.integers(1, 200),
)
@example([59], 60, None, 60)
@example([60], 60, None, 60)
@example([60, 60], 60, None, 119)
@example([10], 5, 20, 10)
def test_segments_of_pieces_are_those_of_the_whole_file(lengths, num_samples, hop, part_samples):
    samples = np.arange(sum(lengths), dtype=np.float32)
    pieces = np.split(samples, np.cumsum(lengths)[:-1])
    with mock.patch.object(audio, "PART_SAMPLES", part_samples):
        parts = list(cut_pieces(iter(pieces), num_samples, hop))
        at_most = segments_per_part(num_samples, hop)
    starts = range(0, len(samples) - num_samples + 1, hop or num_samples)
    expected = [samples[start : start + num_samples] for start in starts]
    expected = np.array(expected, np.float32).reshape(-1, num_samples)
    np.testing.assert_array_equal(cut_segments(samples, num_samples, hop), expected)
    np.testing.assert_array_equal(np.concatenate([expected[:0], *parts]), expected)
    # Every part except the last is as long as the limit allows.
    assert all(len(part) == at_most for part in parts[:-1])
    assert all(0 < len(part) <= at_most for part in parts)
    span = (at_most - 1) * (hop or num_samples) + num_samples
    assert span <= max(part_samples, num_samples)


def test_part_has_142_segments():
    """The records of test shards depend on this number."""
    assert segments_per_part(NUM_SAMPLES) == 142
    assert segments_per_part(1 << 30) == 1


def test_missing_madmom_says_what_to_do(mp3, monkeypatch):
    monkeypatch.setitem(sys.modules, "madmom", None)
    monkeypatch.setitem(sys.modules, "madmom.audio", None)
    with pytest.raises(UsageError, match=r"madmom cannot be imported.*requirements/madmom\.txt"):
        decode(mp3, decoder="madmom")
