"""Wikitext, the markup of MediaWiki, to running text.

What stays is what a reader of the article sees as sentences.  In the order of the steps:

    comments, tags        <!-- … --> goes.  Tags go and leave what they enclose; REMOVED and EMBEDDED take it with them
    formulas              <math> leaves what is plain text (x, n + 1, x^2); LaTeX (\\frac{a}{b}) goes
    <nowiki>              leaves what it encloses as it is written
    templates             {{…}} and {{{…}}} go; FUNCTIONS and {{PAGENAME}} are computed
    links                 [[target|label]] leaves its label, else its target; files, categories, other namespaces and
                          languages go; titles such as [[Alien: Covenant]] stay (shown_target)
    tables                {| … |} goes
    [URL label]           leaves its label
    quotes                '''bold''' and ''italic'' leave bold and "italic"
    = heading =           becomes "heading." where text comes before the next heading of its level, else it goes
    lists                 lines with * # ; go; lines with : stay

Each line is a paragraph.  Lines without a letter or digit, and those from one parenthesis to another, go.  As in
MediaWiki, a mark without its counterpart is text; a line that begins with one goes.  Every step takes time in
proportion to the text, whatever is in it: a stack holds what is open, and no search is repeated that failed.
"""

import html
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from operator import itemgetter


def set_of(names: str) -> frozenset[str]:
    return frozenset(names.split())


# Tags

TAG = re.compile(r"<(?:(!--)|(/?)([A-Za-z][A-Za-z0-9]*)((?:[\s/][^<>]*)?)>)")
FORMULAS = set_of("ce chem math")
EMBEDDED = set_of(  # hold no wikitext, and end with the first end tag
    "categorytree charinsert gallery graph hiero imagemap includeonly indicator inputbox maplink mapframe pre ref "
    "references score source syntaxhighlight templatedata timeline")
OPAQUE = FORMULAS | EMBEDDED | {"nowiki"}
REMOVED = set_of("dl ol small table ul")  # with all between, where more of the kind may be
INLINE = set_of(
    "a abbr address article aside audio b bdi bdo big caption cite code col colgroup data del details dfn em "
    "figcaption figure font form i img input ins kbd link main mark menu meta nav noinclude onlyinclude option param "
    "phonos picture q rb rbc rp rt rtc ruby s samp section select span strike strong sub summary sup tbody "
    "templatestyles textarea tfoot thead time translate tt tvar u var video wbr")
BLOCKS = set_of("blockquote center dd div dt h1 h2 h3 h4 h5 h6 hr li p poem tr")
REPLACED = (dict.fromkeys(INLINE | OPAQUE | REMOVED, "") | dict.fromkeys(BLOCKS, "\n")
            | dict.fromkeys(("br", "td", "th"), " "))
ENDS = {name: re.compile(rf"</{name}\s*>", re.IGNORECASE) for name in OPAQUE}
LATEX = re.compile(r"[\\{}]")
LITERAL = {ord(sign): f"&#{ord(sign)};" for sign in "'[]{}|*#:;=_"}  # so that the steps after this one see no markup

# Templates, links and tables

FUNCTION = re.compile(r"\{\{(?:(formatnum|lcfirst|ucfirst|lc|uc):([^{}|]*)(?:\|[^{}]*)?|PAGENAME)\}\}")
FUNCTIONS = {"formatnum": str, "lc": str.lower, "uc": str.upper,
             "lcfirst": lambda text: text[:1].lower() + text[1:], "ucfirst": lambda text: text[:1].upper() + text[1:]}
TEMPLATE = re.compile(r"\{\{(?<!\{\{\{)(?!\{)[^{}]*\}\}")  # that holds no other
LINK = re.compile(r"\[\[(?![^][|:\n{}]*[:\n{}])(?:[^][|]*\|)?([^][{}]*)\]\]")  # that holds no other, and no namespace
MARK = re.compile(  # literals first, which are found faster; of ]]] the first is the end of [URL label]
    r"\{\{+|\}\}+|\[\[|\]\](?!\](?!\]))|\n[ :]*\{\||\n *\|\}(?!\})")
TARGET_PIECES = 4  # into which templates may have cut the target of a link
MEDIA = tuple(f".{ending}" for ending in set_of(
    "jpg jpeg png gif svg webp tif tiff xcf pdf djvu ogg oga ogv opus webm mp3 mp4 wav flac mid midi stl"))
NAMESPACES = set_of(  # whose links may have a space behind the colon, elsewhere the sign of a title
    "category file help image media portal talk template user wikipedia bild datei fichier imagen archivo imagem "
    "ficheiro immagine файл изображение catégorie categoría categoria categorie kategorie kategori kategoria "
    "kategória kategorija luokka flokkur категория категорія катэгорыя категорија κατηγορία קטגוריה تصنيف رده 分类 "
    "分類 カテゴリ 분류")
SISTERS = set_of(  # other projects of Wikimedia, to which a text links as to pages of its own
    "b c commons d m meta mw n q s species v voy w wikibooks wikidata wikinews wikiquote wikisource wikispecies "
    "wikiversity wikivoyage wikt wiktionary")

# Text

EXTERNAL = re.compile(r"\[(?:(?:[a-z][a-z+.-]*:)?//|(?:mailto|news|tel):)((?:[^][\n]|\[[^][\n]*\])*)\]", re.IGNORECASE)
BOLD_ITALIC = re.compile(r"'''''([^\n]*?)'''''")
GENITIVE = re.compile(r"''(?<!''')(?!')([^'\n]+)'''(?=s\b)")  # ''Hamlet'''s
EMPTY_ITALIC = re.compile(r"''''(?<![\w']'''')(?!')")  # ''{{lang|…}}'', but not Ha''''kon'''
MAGIC_WORD = re.compile(r"__[^\W\da-z]+__")  # __TOC__ in any language
VARIANTS = re.compile(r"-\{(?:[A-Z]\|)?(?:zh(?:-\w+)*:)?([^;{}]*)(?:;[^{}]*)?\}-")  # a word in several Chinese scripts
ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9A-Fa-f]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
WORD = re.compile(r"[^\W_]")
NO_TEXT = frozenset(("", *"*#;|{}"))  # at the start of a line: a list, or what is left of a table or template
SENTENCE_ENDS = tuple(".!?。！？؟।…")
SPACE_BEFORE, SPACE_BEHIND = re.compile(r" (?=[,:)\]»]|\.(?!\.))"), re.compile(r"([(\[«]) ")
REPEATED_COMMAS = re.compile(r",,+ ")
# Where a template was in parentheses: (; 1900), (1900,) and （，）
PARENTHESIS_START, PARENTHESIS_END = re.compile(r"\([,;:][ ,;:]*"), re.compile(r"[,;](?<=\w[,;])[ ,;]*\)")
EMPTY_PARENTHESES = re.compile(r"（[ ,;，、；：]*）")


class OpenMarks:
    """The marks that wait for their ends: a stack of their kinds, places in the output and numbers of braces.

    An end belongs to the nearest mark of its kind, and makes those behind that one text.  So all ends together take
    time in proportion to the number of marks.
    """

    def __init__(self):
        self.stack, self.counts = [], Counter()

    def open(self, kind: str, place: int, braces: int = 0) -> None:
        self.stack.append((kind, place, braces))
        self.counts[kind] += 1

    def close(self, kind: str) -> tuple[int, int] | None:
        """Place and number of braces of the nearest mark of a kind, which is open no more; None where none is open."""
        if not self.counts[kind]:
            return None
        while True:
            last, place, braces = self.stack.pop()
            self.counts[last] -= 1
            if last == kind:
                return place, braces


def plain_text(title: str, wikitext: str) -> str:
    """The running text of a page on one line, with tabs between paragraphs.  No markup makes it fail.

    title, wikitext: as editors write them, not as the XML of a dump has them.

    >>> plain_text("Io", "'''Io''' is a [[natural satellite|moon]].{{cite|x}}\\n== Orbit ==\\nIt takes 42 [[hour]]s.")
    'Io is a moon.\\tOrbit.\\tIt takes 42 hours.'
    """
    text = without_tags(wikitext)
    text = without_structures(without_simple_templates(text, title))
    if "[" in text:
        text = EXTERNAL.sub(external_label, text)
    if "-{" in text:
        text = VARIANTS.sub(r"\1", text)
    if "__" in text:
        text = MAGIC_WORD.sub("", text)
    if "''" in text:
        text = without_quotes(text)
    return closed_up(one_line(paragraphs(text)))


def one_line(paragraphs: Iterable[str]) -> str:
    """Paragraphs on one line, separated by tabs; other white space becomes single spaces."""
    return "\t".join(filter(None, (" ".join(paragraph.split()) for paragraph in paragraphs)))


def without_tags(text: str) -> str:
    """The text without comments and the tags that MediaWiki knows; others are text."""
    out, end, marks, endless = [], 0, OpenMarks(), set()
    while tag := TAG.search(text, end):
        out.append(text[end:tag.start()])
        end = tag.end()
        comment, closing, name, attributes = tag.groups()
        if comment:
            found = text.find("-->", end)
            end = found + len("-->") if found >= 0 else len(text)  # without its end it hides all that follows
            continue
        name = name.lower()
        opening = not closing and attributes[-1:] != "/"
        if name in OPAQUE and opening and name not in endless:
            found = ENDS[name].search(text, end)
            if found:
                out.append(embedded_text(name, text[end:found.start()]))
                end = found.end()
            else:
                endless.add(name)
        elif name in REMOVED and opening:
            marks.open(name, len(out))
        elif name in REMOVED and closing and (mark := marks.close(name)):
            del out[mark[0]:]
        else:
            out.append(REPLACED.get(name, tag[0]))
    out.append(text[end:])
    return "".join(out)


def embedded_text(name: str, content: str) -> str:
    """What is shown of an element that holds no wikitext."""
    shown = name == "nowiki" or name in FORMULAS and not LATEX.search(content)
    return content.translate(LITERAL) if shown else ""


def without_simple_templates(text: str, title: str) -> str:
    """The text without the templates that hold no other, and with the functions computed."""
    def computed(function: re.Match) -> str:
        name, value = function.groups()
        return FUNCTIONS[name](value.strip()) if name else title.translate(LITERAL)

    return TEMPLATE.sub("", FUNCTION.sub(computed, text))


def without_structures(text: str) -> str:
    """The text without the other templates and tables, and with links replaced by what is shown of them."""
    text, out, end, marks = "\n" + LINK.sub(itemgetter(1), text), [], 0, OpenMarks()
    for found in MARK.finditer(text):
        out.append(text[end:found.start()])
        end, mark = found.end(), found[0]
        if mark == "]]":
            close_link(out, marks.close("["))
        elif mark[0] == "}":
            close_braces(out, marks, len(mark))
        elif mark[-1] == "}":
            opened = marks.close("|")
            out[opened[0] if opened else len(out):] = ["\n" if opened else mark]
        else:
            marks.open(mark[-1], len(out), len(mark))
            out.append(mark)
    out.append(text[end:])
    return "".join(out)


def close_braces(out: list[str], marks: OpenMarks, count: int) -> None:
    """Remove what a run of closing braces ends: templates, and parameters, which have three braces."""
    while count >= 2 and (opened := marks.close("{")):
        place, braces = opened
        while min(count, braces) >= 2:
            used = min(count, braces, 3)
            count, braces = count - used, braces - used
        out[place:] = ["{" * braces]
        if braces >= 2:
            marks.open("{", place, braces)
    out.append("}" * count)


def close_link(out: list[str], opened: tuple[int, int] | None) -> None:
    """Replace the pieces of a link, which begin with its opening mark, by what is shown of it."""
    if not opened:
        out.append("]]")
        return
    place, target = opened[0], ""
    for bar in range(place + 1, min(place + 1 + TARGET_PIECES, len(out))):
        before, has_label, label = out[bar].partition("|")
        target += before
        if has_label:
            break
    shown = shown_target(target)
    if "//" in target or "\n" in target:  # no link, or an external one
        out.append("]]")
    elif shown is None:
        del out[place:]
    else:
        out[place:bar + 1] = [""] * (bar - place) + [label if has_label else shown]


def shown_target(target: str) -> str | None:
    """What is shown of a link without a label; None where nothing is shown, whether there is a label or not.

    >>> shown_target("Alien: Covenant"), shown_target("wikt:moon"), shown_target("File:Moon.jpg")
    ('Alien: Covenant', 'moon', None)
    """
    prefix, colon, rest = target.partition(":")
    name = prefix.strip().lower()
    if not colon or "#" in prefix or name.isdecimal():  # 16:9
        return target
    if not name:  # [[:Category:Moons]] links to the category
        return rest
    if name in SISTERS:
        return rest
    if rest[:1] != " " or name in NAMESPACES or rest.rstrip().lower().endswith(MEDIA):
        return None
    return target


def external_label(link: re.Match) -> str:
    """The label of an external link."""
    return link[1].partition(" ")[2]


def without_quotes(text: str) -> str:
    """The text without the marks of bold letters, and with quotation marks for those of italics."""
    text = GENITIVE.sub(r"''\1''&#39;", EMPTY_ITALIC.sub("", BOLD_ITALIC.sub(itemgetter(1), text)))
    text = text.replace("'''", "").replace("\"''", '"').replace("''\"", '"')  # "''x''" has its quotation marks
    return text.replace("''", '"')


def paragraphs(text: str) -> Iterator[str]:
    """The lines of running text, and the headings that have some below."""
    headings = []  # level and title of those above the line without text so far
    for line in map(str.strip, text.split("\n")):
        if line[:1] == "=" == line[-1:]:
            level, title = section_heading(line)
            while headings and headings[-1][0] >= level:
                headings.pop()
            headings.append((level, title))
            continue
        line = line.lstrip(": ")
        if line[:1] in NO_TEXT:
            continue
        line = with_characters(line)
        if line[:1] == "(" and line[-1] == ")" or not WORD.search(line):
            continue
        yield from (title for _, title in headings)
        headings.clear()
        yield line


def section_heading(line: str) -> tuple[int, str]:
    """Level and title of a line that begins and ends with =, the title with a full stop if it has no mark at its end.

    >>> section_heading("== What is it? =="), section_heading("=== Name ===")
    ((2, 'What is it?'), (3, 'Name.'))
    """
    level = min(len(line) - len(line.lstrip("=")), len(line) - len(line.rstrip("=")), (len(line) - 1) // 2, 6)
    title = with_characters(line[level:len(line) - level].strip())
    if not WORD.search(title):
        return level, ""
    return level, title if title.endswith(SENTENCE_ENDS) else f"{title}."


def with_characters(line: str) -> str:
    """The line with its entities replaced by what they stand for."""
    return ENTITY.sub(lambda entity: html.unescape(entity[0]), line) if "&" in line else line


def closed_up(text: str) -> str:
    """The text without the spaces and marks that stood beside what was removed.

    >>> closed_up("Bern (; 1191) , ( ) « city »")
    'Bern (1191), «city»'
    """
    text = SPACE_BEHIND.sub(itemgetter(1), SPACE_BEFORE.sub("", text))
    text = PARENTHESIS_END.sub(")", PARENTHESIS_START.sub("(", REPEATED_COMMAS.sub(", ", text)))
    return EMPTY_PARENTHESES.sub("", text.replace(" ()", ""))
