import pytest

from twin.spec.units import format_bytes, format_s, format_si, parse_quantity


@pytest.mark.parametrize(
    ("text", "dimension", "value"),
    [
        ("450 GB/s", "bytes_per_s", 450e9),
        ("400 Gb/s", "bytes_per_s", 50e9),
        ("400 Gbps", "bytes_per_s", 50e9),
        ("80 GiB", "bytes", 80 * 2**30),
        ("141GB", "bytes", 141e9),
        ("989 TFLOP/s", "flop_per_s", 989e12),
        ("20 ms", "s", 0.02),
        ("5 µs", "s", 5e-6),
        ("12 req/s", "per_s", 12.0),
        ("2.5 $/h", "usd_per_h", 2.5),
        (7, "s", 7.0),
    ],
)
def test_parse(text, dimension, value):
    assert parse_quantity(text, dimension) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("text", ["450", "450 GB", "GB/s", "4 5 GB/s", "450 gb/s ", "nan GB/s", True, "1" * 80 + " GB/s"])
def test_refuse(text):
    with pytest.raises(ValueError, match="expected|fit|quantity"):
        parse_quantity(text, "bytes_per_s")


def test_format():
    assert format_bytes(80 * 2**30) == "80.0 GiB"
    assert format_si(450e9, "B/s") == "450 GB/s"
    assert [format_s(x) for x in (1.5, 0.0183, 27e-6, None)] == ["1.5 s", "18.3 ms", "27 µs", "–"]
