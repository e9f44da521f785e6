"""Any folder, list, table or tar, whole or damaged: read, listed as skipped, or a ValueError of one line."""

import io
import os
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
from fuzzing import DAMAGE, cases, damaged, tried
from fuzzing_files import BYTES, PICTURES, folders, read
from hypothesis import strategies as st

NAMES = st.one_of(
    st.sampled_from(
        [
            "a.png",
            "a.PNG",
            "b.jpg",
            "c.jpeg",
            ".hidden.png",
            "Thumbs.db",
            "x",
            "y.txt",
            "-.gif",
            "*.png",
            "a b.webp",
            "é.bmp",
            "e\u0301.png",
            "[1].png",
            "{0..2}.png",
            "\udcff.png",
            "new\nline.png",
            "#1.tif",
            "%s.png",
            "~.png",
            "a.b.c.png",
        ]
    ),
    st.text(max_size=6).map(lambda text: text.replace("/", "").replace("\0", "") + ".png"),
)
LABELS = st.one_of(st.none(), st.text(max_size=4), st.integers(-2, 3), st.floats())


@cases(100)
def test_folders_and_lists_of_paths(n, tmp_path, monkeypatch):
    fresh = folders(tmp_path, monkeypatch)

    def check(files, links, ways):
        folder = fresh() / "in"
        folder.mkdir()
        for parts, data in files:
            place = folder.joinpath(*parts)
            if not any(above.is_file() for above in place.parents) and not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(data)
        for name, to in links:
            round_about = ways == "glob" and to in (
                ".",
                "..",
            )  # Python's glob follows these, as often as there are ways
            if not os.path.lexists(folder / name) and not round_about:
                (folder / name).symlink_to(to)
        if len(links) == 2 and not os.path.lexists(folder / "pipe.png"):
            os.mkfifo(folder / "pipe.png")
        read({"folder": "in", "glob": "in/**/*", "names": sorted(map(str, folder.glob("*"))), "here": "."}[ways])

    files = st.lists(st.tuples(st.lists(NAMES, min_size=1, max_size=3), BYTES), max_size=5)
    links = st.lists(
        st.tuples(NAMES, st.sampled_from([".", "..", "a.png", "nothing", "loop.png", "/dev/null", "/dev/zero"])),
        max_size=3,
    )
    tried(n, check, files, links, st.sampled_from(["folder", "folder", "glob", "names", "here"]))


@cases(100)
def test_files_that_list_images(n, tmp_path, monkeypatch):
    fresh = folders(tmp_path, monkeypatch)

    def check(lines, suffix, encoding, damage):
        folder = fresh()
        for i, data in enumerate(PICTURES[:4]):
            (folder / f"{i}.png").write_bytes(data)
        text = "\n".join(lines).encode(encoding, "surrogatepass" if "utf" in encoding else "replace")
        (folder / f"list{suffix}").write_bytes(damaged(text, damage) if damage else text)
        read(f"list{suffix}")

    cells = st.one_of(
        st.sampled_from(
            ["0.png", "1.png", "./2.png", "path", "label", "~nobody/a.png", "/dev/zero", "list.csv", '"', "\0"]
        ),
        st.text(max_size=5),
    )
    rows = st.lists(cells, min_size=1, max_size=3)
    lines = st.lists(st.one_of(rows.map(",".join), rows.map("\t".join), st.just("path,label"), cells), max_size=6)
    codes = st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"])
    tried(n, check, lines, st.sampled_from([".csv", ".tsv", ".txt", ".lst"]), codes, st.one_of(st.none(), DAMAGE))


COLUMNS = st.one_of(
    st.sampled_from([pa.binary(), pa.large_binary(), pa.string(), pa.large_string()]).map(lambda kind: ("plain", kind)),
    st.sampled_from(
        [
            pa.int64(),
            pa.float32(),
            pa.bool_(),
            pa.list_(pa.uint8()),
            pa.null(),
            pa.binary(3),
            pa.struct([("x", pa.int8())]),
        ]
    ).map(lambda kind: ("odd", kind)),
    st.sampled_from(
        [
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            pa.struct([("bytes", pa.binary())]),
            pa.struct([("path", pa.string())]),
            pa.struct([("bytes", pa.int32()), ("path", pa.list_(pa.string()))]),
            pa.struct([("a", pa.struct([("bytes", pa.binary())]))]),
            pa.list_(pa.struct([("bytes", pa.binary())])),
            pa.dictionary(pa.int32(), pa.string()),
        ]
    ).map(lambda kind: ("struct", kind)),
)


def column(kind: pa.DataType, rows: list) -> pa.Array:
    """As many values of a type: images where it holds bytes, paths where it holds text, nothing or zeros elsewhere."""
    if pa.types.is_struct(kind):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        return pa.StructArray.from_arrays([column(f.type, rows) for f in fields], fields=fields)
    if pa.types.is_dictionary(kind):
        return column(pa.string(), rows).dictionary_encode()
    if kind in (pa.binary(), pa.large_binary()):
        return pa.array([data for data, _ in rows], kind)
    if kind in (pa.string(), pa.large_string()):
        return pa.array([name for _, name in rows], kind)
    if pa.types.is_list(kind):
        return pa.array([[] for _ in rows], kind)
    return pa.array(
        [
            None if kind == pa.null() else b"abc" if kind == pa.binary(3) else False if kind == pa.bool_() else 0
            for _ in rows
        ],
        kind,
    )


@cases(150)
def test_parquet(n, tmp_path, monkeypatch):
    fresh = folders(tmp_path, monkeypatch)

    def check(kind, name, rows, labels, groups, known, damage, shards):
        folder = fresh()
        (folder / "a.png").write_bytes(PICTURES[3])
        columns = {name: column(kind[1], rows)}
        if labels is not None:
            try:
                columns["label"] = pa.array((labels * len(rows))[: len(rows)] if labels else [None] * len(rows))
            except (pa.ArrowException, OverflowError):
                columns["label"] = pa.array([str(labels)] * len(rows))
        table = pa.table(columns).replace_schema_metadata(None if known is None else {b"huggingface": known})
        for i in range(shards):
            pq.write_table(
                table,
                folder / f"{i}.parquet",
                row_group_size=groups,
                compression=["snappy", "none", "zstd"][groups % 3],
            )
        if damage:
            (folder / "0.parquet").write_bytes(damaged((folder / "0.parquet").read_bytes(), damage))
        read("0.parquet" if shards == 1 else ".")

    names = st.sampled_from(["image", "image", "img", "picture"])
    rows = st.lists(
        st.tuples(
            st.one_of(st.none(), BYTES),
            st.one_of(
                st.none(),
                st.sampled_from(["a.png", "", "~nobody", "/dev/zero", "\0", "x" * 300]),
                st.text(st.characters(codec="utf-8"), max_size=3),
            ),
        ),
        max_size=4,
    )
    known = st.sampled_from(
        [
            None,
            b'{"info":{"features":{"label":{"names":["a","b"]}}}}',
            b"{",
            b"[" * 100_000,
            b'{"info":{"features":{"label":{"names":7}}}}',
            b'{"info":{"features":{"label":{"names":[1,null]}}}}',
            b"\xff",
        ]
    )
    tried(
        n,
        check,
        COLUMNS,
        names,
        rows,
        st.one_of(st.none(), st.lists(LABELS, max_size=3)),
        st.integers(1, 3),
        known,
        st.one_of(st.none(), st.none(), DAMAGE),
        st.integers(1, 2),
    )


@cases(100)
def test_tars(n, tmp_path, monkeypatch):
    fresh = folders(tmp_path, monkeypatch)

    def check(members, form, damage, shards):
        folder = fresh()
        for i in range(shards):
            with tarfile.open(folder / f"{i}.tar", "w", format=form) as tar:
                for name, data, kind in members:
                    member = tarfile.TarInfo(name if form != tarfile.USTAR_FORMAT else name[:90])
                    member.type, member.size = kind, len(data) if kind in tarfile.REGULAR_TYPES else 0
                    member.linkname = "a.png"
                    tar.addfile(member, io.BytesIO(data))
        if damage:
            (folder / "0.tar").write_bytes(damaged((folder / "0.tar").read_bytes(), damage))
        read("0.tar" if shards == 1 else ".")

    names = st.one_of(
        NAMES.map(lambda name: name.encode("utf-8", "replace").decode()),
        st.sampled_from(
            ["../../a.png", "/etc/a.png", "0.cls", "a.cls", "d/a.png", "x" * 300 + ".png", "a.cls.png", ".cls"]
        ),
    )
    kinds = st.sampled_from(
        [tarfile.REGTYPE] * 6
        + [
            tarfile.DIRTYPE,
            tarfile.SYMTYPE,
            tarfile.LNKTYPE,
            tarfile.CHRTYPE,
            tarfile.FIFOTYPE,
            tarfile.GNUTYPE_SPARSE,
            tarfile.AREGTYPE,
            b"?",
        ]
    )
    members = st.lists(
        st.tuples(names, st.one_of(BYTES, st.sampled_from([b"3\n", b"\xff", b"0" * 2000])), kinds), max_size=5
    )
    tried(
        n,
        check,
        members,
        st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
        st.one_of(st.none(), DAMAGE),
        st.integers(1, 2),
    )
