"""Wikipedia: downloads its dumps, and reads their articles as a stream (the .bz2 is never unpacked to disk).

Wikimedia's multistream dumps are cut between their bzip2 streams, and the workers decompress them.  Any other dump is
decompressed by the main process and cut between pages.  The workers extract the articles (wikitext.py).
"""

import bz2
import html
import re
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

from common.download import file_checksum
from common.errors import UserError
from data.preparation import archives
from data.preparation.downloads import DownloadOptions, fetch_or_copy, mirrored, pip_download
from data.preparation.formatting import TextFormat
from data.preparation.wikitext import one_line, plain_text

DUMPS = "https://dumps.wikimedia.org"
DUMP_ENDING = "-pages-articles-multistream.xml.bz2"  # many bzip2 streams, which workers decompress in parallel

OLD_CODES = {"be_tarask": "be_x_old", "nb": "no", "lzh": "zh_classical", "yue": "zh_yue", "nan": "zh_min_nan",
             "gsw": "als", "rup": "roa_rup", "sgs": "bat_smg", "vro": "fiu_vro"}  # that the dumps keep

SAMPLE_WHEEL = "pip:gensim==4.4.0"
SAMPLE_MEMBER = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
SAMPLE_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
SAMPLE_FILE = "enwiki-sample-pages-articles.xml.bz2"

BATCH_BYTES = 1 << 20  # XML handed to a worker at a time
LONGEST_PAGE = 1 << 28  # bytes; a file without the end of a page within this is no dump
STREAM_BYTES = 1 << 18  # compressed streams handed to a worker at a time
LOOKAHEAD = 1 << 24  # bytes; a multistream dump has a second stream within this

WIKITEXT_RULES = 1  # for the records; grows when wikitext.py makes other text of the same dump

STREAM_START = re.compile(rb"BZh[1-9]1AY&SY")

PAGE_END, DOC_END = b"</page>", b"</doc>"
DOC = re.compile(r"<doc\b[^>]*>\n?(.*?)</doc>", re.DOTALL)
TITLE = re.compile(rb"<title>([^<]*)")
ENTITIES = ((b"&lt;", b"<"), (b"&gt;", b">"), (b"&quot;", b'"'), (b"&apos;", b"'"), (b"&#039;", b"'"),
            (b"&amp;", b"&"))  # & last: &amp;lt; is &lt;
TEXT, TEXT_END = re.compile(rb"<text\b[^>]*>"), b"</text>"


def download_dump(folder: Path, options: DownloadOptions, language: str = "en") -> tuple[list[Path], list[str]]:
    """The dump of a language's Wikipedia of a date (YYYYMMDD), or the newest.

    Wikimedia's list of checksums says which dump is the newest.  The list is kept, so that an interrupted download
    continues with the same dump when a newer one appears; delete it to get the newer one.
    """
    wiki = wiki_name(language)
    sums = folder / f"{wiki}-{options.dump_date}-sha1sums.txt"
    if not sums.is_file():
        fetch_or_copy(f"{DUMPS}/{wiki}/{options.dump_date}/{sums.name}", sums, options)
    for line in sums.read_text(encoding="utf-8").splitlines():
        sha1, _, name = line.partition("  ")
        if name.startswith(f"{wiki}-") and name.endswith(DUMP_ENDING):
            source = f"{DUMPS}/{wiki}/{name.split('-')[1]}/{name}"
            return [fetch_or_copy(source, folder / name, options, sha1=sha1)], []
    raise UserError(f"{sums}: no …{DUMP_ENDING} in it; that dump is not finished (--dump_date names another)")


def wiki_name(language: str) -> str:
    """Wikimedia's name of a language's Wikipedia.

    >>> wiki_name("de"), wiki_name("zh-yue"), wiki_name("be-tarask")
    ('dewiki', 'zh_yuewiki', 'be_x_oldwiki')
    """
    code = language.replace("-", "_")
    return f"{OLD_CODES.get(code, code)}wiki"


def download_sample(folder: Path, options: DownloadOptions) -> tuple[list[Path], list[str]]:
    """106 articles of English Wikipedia, from the test data in the wheel of gensim."""
    target = folder / SAMPLE_FILE
    if target.is_file() and file_checksum(target) == SAMPLE_SHA256:
        return [target], []
    origin = mirrored(SAMPLE_WHEEL, options.mirrors)
    with tempfile.TemporaryDirectory() as scratch:
        wheel = pip_download(origin.removeprefix("pip:"), scratch) if origin.startswith("pip:") \
            else fetch_or_copy(SAMPLE_WHEEL, Path(scratch) / "gensim.whl", options)
        file, = archives.unpack(wheel, Path(scratch), [SAMPLE_MEMBER])
        return [fetch_or_copy(str(file), target, options, sha256=SAMPLE_SHA256)], []


def dump_batches(paths, progress=lambda size: None, end: bytes = PAGE_END):
    """Yield dumps as (bytes of whole pages, whether they are still compressed), each about 1 MB of XML.

    `progress` is called with the number of bytes read since its last call.  UserError for a damaged file, or one
    without pages.
    """
    for path in paths:
        archives.refuse_other_content(path)
        compressed = is_multistream(path)
        for batch in stream_batches(path, progress) if compressed else page_batches(path, progress, end):
            yield batch, compressed


def is_multistream(path) -> bool:
    """Whether a file consists of many bzip2 streams: Wikimedia's multistream dumps have one for every 100 pages."""
    with open(path, "rb") as file:
        return len(STREAM_START.findall(file.read(LOOKAHEAD))) > 1


def stream_batches(path, progress):
    """Yield whole bzip2 streams, still compressed, in pieces of about 256 kB.  Pages do not cross streams."""
    waiting = b""
    with open(path, "rb") as file:
        while block := file.read(STREAM_BYTES):
            progress(len(block))
            waiting += block
            starts = [found.start() for found in STREAM_START.finditer(waiting)]
            if len(starts) > 1:
                yield waiting[:starts[-1]]
                waiting = waiting[starts[-1]:]
    yield waiting


def page_batches(path, progress, end: bytes):
    """Yield the decompressed XML of a dump in pieces of about 1 MB that end with a page."""
    rest, found, position = b"", False, 0
    try:
        with open(path, "rb") as raw, archives.decompressed(path, raw) as stream:
            while block := stream.read(BATCH_BYTES):
                progress(raw.tell() - position)
                position = raw.tell()
                rest += block
                cut = rest.rfind(end) + len(end)
                if cut >= len(end):
                    found = True
                    yield rest[:cut]
                    rest = rest[cut:]
                if len(rest) > LONGEST_PAGE:
                    raise UserError(f"{path}: no {end.decode()} in {len(rest)} bytes; is this what it should be?")
    except archives.DAMAGED as error:
        raise UserError(f"{path}: damaged or cut short ({error})") from None
    if not found:
        raise UserError(f"{path}: no {end.decode()} in it; is this what it should be?")


def extract_articles(xml: bytes, compressed: bool) -> tuple[list[str], dict, list[str]]:
    """The articles of a batch of pages, each as one line; counts of the pages by outcome; and the titles of those that
    could not be read.

    Redirects and pages of other namespaces (talk, templates, files) are skipped, too.
    """
    articles, counts, skipped = [], Counter(), []
    if compressed:
        xml = decompress(xml)
    for page in xml.split(PAGE_END)[:-1]:
        title = TITLE.search(page)
        title = unescaped(title[1]).decode("utf-8", errors="replace") if title else "(no title)"
        text, outcome = article_text(page, title)
        counts[outcome] += 1
        if text:
            articles.append(text)
        elif outcome == "not_utf8":
            skipped.append(f"{title}: {outcome}")
    return articles, dict(counts), skipped


def decompress(streams: bytes) -> bytes:
    try:
        return bz2.decompress(streams)
    except (OSError, ValueError) as error:
        raise UserError(f"the dump is damaged or cut short ({error})") from None


def read_extracted(docs: bytes, compressed: bool) -> tuple[list[str], dict, list[str]]:
    """The same for a batch of <doc …> elements, which wikiextractor's own command writes."""
    articles, counts = [], Counter()
    for doc in DOC.findall(docs.decode("utf-8", errors="replace")):
        text = one_line(html.unescape(doc).split("\n")[1:])  # without the title
        counts["documents" if text else "empty"] += 1
        if text:
            articles.append(text)
    return articles, dict(counts), []


def article_text(page: bytes, title: str) -> tuple[str, str]:
    """The article in the XML of a page as one line, and "documents"; or "" and the reason why there is none."""
    wikitext, outcome = article_wikitext(page)
    if outcome != "documents":
        return "", outcome
    try:
        line = plain_text(title, wikitext.decode("utf-8"))
    except UnicodeDecodeError:
        return "", "not_utf8"
    return (line, "documents") if line else ("", "empty")


def article_wikitext(page: bytes) -> tuple[bytes, str]:
    """The same for the article's wikitext."""
    text = TEXT.search(page)
    head = page[:text.start()] if text else page
    if b"<ns>0</ns>" not in head:
        return b"", "other_namespaces"
    if b"<redirect" in head:
        return b"", "redirects"
    end = page.find(TEXT_END, text.end()) if text else -1  # <text … /> has none
    return (unescaped(page[text.end():end]), "documents") if end >= 0 else (b"", "empty")


def unescaped(xml: bytes) -> bytes:
    """The content of an XML element that holds no other."""
    for entity, sign in ENTITIES:
        xml = xml.replace(entity, sign)
    return xml


DUMP = TextFormat(batches=dump_batches, read_batch=extract_articles, flags={"wikitext_rules": WIKITEXT_RULES})
EXTRACTED = TextFormat(batches=partial(dump_batches, end=DOC_END), read_batch=read_extracted, pattern="wiki_*",
                       extracted=True)
