"""Which column is the user, the item, the rating and the time, and whether the first line names the columns."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from perfedrec.core.counted import counted
from perfedrec.core.errors import DataError
from perfedrec.core.nearest import listing, nearest, quoted
from perfedrec.data.times import ISO, SLASHES, like_times
from perfedrec.data.values import ALL_ROLES, POSITION, ROLES

Columns = Mapping[str, str | int]
Sample = Callable[[int], pl.Series]  # the first values of a column, which is counted from 0

# Names in plain form (see plain_name). Those of an earlier group are preferred to those of a later one.
KNOWN_NAMES: dict[str, tuple[frozenset[str], ...]] = {
    role: tuple(frozenset(names.split()) for names in groups)
    for role, groups in {
        "user": (
            "user userid uid u reviewerid customer customerid custid visitorid userno usernum useridx userindex "
            "memberid member accountid clientid personid profileid playerid steamid readerid viewerid "
            "listenerid raterid consumerid shopperid buyerid studentid learnerid subscriberid msno userhash usersid "
            "iduser followerid",
            "username usernickname nickname login screenname reviewer reviewername usermboxsha1 usersha1 profilename "
            "reviewprofilename reviewuserid person player reader viewer listener rater users",
        ),
        "item": (
            "item itemid iid i movieid movie bookid businessid productid artistid asin parentasin isbn gameid appid "
            "songid trackid venueid locationid poiid placeid articleid newsid animeid recipeid beerid beerbeerid "
            "jokeid restaurantid hotelid videoid photoid pinid goodsid skuid sku listingid showid postid musicid "
            "albumid filmid storyid workid documentid docid contentid courseid adid repoid mangaid eventid groupid "
            "iditem itemno itemnum itemidx itemindex productno stockcode bookisbn artistmbid",
            "itemname artistname artist trackname track songname song songtitle productname product producttitle "
            "bookname booktitle book title gamename game venue business restaurant animename anime filmname film "
            "movietitle moviename joke recipe beername beer article video place poi album albumname artistsname "
            "businessname items hotel course coursename photo",
        ),
        "rating": (
            "rating ratings score stars overall rate bookrating userrating r reviewoverall reviewscore starrating "
            "reviewrating itemrating myrating ratingvalue ratingscore gameratings star",
            "weight value plays playcount playcounts listencount listeningcount listens count counts hours hoursplayed "
            "playtime playtimeforever preference label frequency freq quantity scrobbles watchratio interaction points",
        ),
        "timestamp": (
            "timestamp unixtimestamp unixtime unixreviewtime",
            "time ts t datetime eventtime reviewtimestamp "
            "ratingtimestamp timestamps checkintime timestampms unixreviewtimes reviewunixtime",
            "date createdat dateadded reviewdate ratedat reviewtime playedat utctime utctimestamp datecreated "
            "rateddate ratingdate created updatedat dateupdated localtime checkindate visittime",
            "when listenedat watchedat viewedat readat visitedat clickedat boughtat purchasedat orderedat loggedat "
            "listendate listeneddate watchdate watcheddate playdate viewdate visitdate eventdate logdate "
            "eventtimestamp orderdate ordertime purchasedate purchasetime transactiondate transactiontime "
            "invoicedate clicktime",
        ),
        POSITION: ("sequenceposition",),
    }.items()
}
TIME_LIKE = re.compile(r"(?i:date|time|timestamp)$|(?i:[_ -]at)$|[a-z]At$")
OTHER_TIMES = re.compile(r"(?i)release|birth|publi|expir|regist|signup|sign_up")  # times that are of no interaction
ONE_USER = -1  # in place of a column: all rows are of one user, whom the file does not name
NOTHING = "none"  # in place of a column: the file has no such role
FEW = 3  # columns that are not used are named up to this number
MANY = 200  # lines that are compared with the first
NAME_LIKE = re.compile(r"(?:[^\W\d]|[_#])[\w .,;:#/()\[\]'&%+?!°-]*")
NAMING = re.compile(r"(?i:(^|[_ .-])(id|ids|name|key|code|uid|no|index|idx|hash|title)$)|[a-z](Id|ID|Name|Key|Code)$")


@dataclass(frozen=True)
class Place:
    """Where a role is: the ``position`` of its column, counted from 1, and its ``name`` if there is a header."""

    position: int
    name: str | None = None

    def __str__(self) -> str:
        return f"column {self.position}" + ("" if self.name is None else f' "{self.name}"')


def plain_name(name: str) -> str:
    """A column name in the form of :data:`KNOWN_NAMES`: "userid" for "user_id:token" and "review/userId"."""
    plain = re.sub(r"[^a-z0-9]", "", name.split(":")[0].lower())
    return plain.removeprefix("review") if plain.startswith(("reviewuser", "reviewitem")) else plain


def as_option(columns: Mapping[str, Place | str | int]) -> str:
    """The option --columns that says where roles are, as it can be pasted into a shell."""
    wanted = {role: (each.name or each.position) if isinstance(each, Place) else each for role, each in columns.items()}
    return f"--columns {shlex.quote(','.join(f'{role}={each}' for role, each in wanted.items()))}"


def names_role(name: str, role: str, ids: bool = False) -> bool:
    """Whether a column name is a known name of a role; a single letter does not count.

    With ``ids``, only the preferred names count, which are those of ids and not of titles.
    """
    plain, groups = plain_name(name), KNOWN_NAMES[role]
    return len(plain) > 1 and any(plain in names for names in (groups[:1] if ids else groups))


def is_header(lines: list[list[str]]) -> bool:
    """Whether the first of some lines, given as fields, names the columns.

    It does if it holds known names of a user and of an item; or if no field of it is a number and some field is a name:
    a known one, one that ends like a name of a column (customer_id), or one above a column of numbers or dates. A field
    that occurs again in its column is no name of it. It also does if it counts the columns (0, 1, 2, ...) above ids
    that are words.
    """
    first, others = lines[0], lines[1 : MANY + 1]
    columns = [[line[i] for line in others if i < len(line)] for i in range(len(first))]
    plain = {plain_name(name) for name in first}
    if all(any(plain & names for names in KNOWN_NAMES[role]) for role in ("user", "item")):
        return True
    if len(first) > 1 and first == [str(i) for i in range(len(first))]:
        return any(cells and not any(map(_is_number, cells)) for cells in columns[:2])
    if any(map(_is_number, first)):
        return False
    for name, cells in zip(first, columns, strict=True):
        if not NAME_LIKE.fullmatch(name.strip()) or name in cells:
            continue
        if any(names_role(name, role) for role in ("user", "item")) or NAMING.search(name.strip()):
            return True
        filled = [cell.strip() for cell in cells if cell.strip()]
        if filled and (all(map(_is_decimal, filled)) or all(map(_is_date, filled))):
            return True
    return False


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return value.strip().lower() not in ("nan", "inf", "infinity")


def _is_decimal(value: str) -> bool:
    """Whether a text is a number, perhaps with a decimal comma, as in 4,5."""
    return _is_number(value.replace(",", ".", 1))


def _is_date(value: str) -> bool:
    return bool(ISO.fullmatch(value) or SLASHES.fullmatch(value))


class NoUserError(DataError):
    """A file that has items, and perhaps ratings and times, but nothing that could name a user."""


def locate(path: Path, names: list[str], header: bool, columns: Columns | None, sample: Sample) -> dict[str, Place]:
    """The place of each role that the file has.

    ``names`` are the names of all columns where there is a ``header``. ``columns`` names some columns, by name or by
    position; where a text is both, it is a name. ``none`` stands for no column. Roles that it does not name keep their
    usual column. ``sample`` gives the first values of a column, which tell whether it has times or ratings. Raises
    :class:`DataError` where a column is missing, or two columns could have one role.
    """
    where, first = dict[str, int](), names
    if header:
        where = _by_name(path, names, columns or {})
    elif columns is None:
        if not 2 <= len(names) <= 4:
            expected = "user item [rating [timestamp]], a header, or --columns user=1,item=2"
            raise DataError(f"{path}, line 1: has {counted(len(names), 'column')}; expected {expected}")
        where = {role: i for i, role in enumerate(ROLES[: len(names)])}
    else:
        names = [str(i + 1) for i in range(len(names))]
    for role, wanted in (columns or {}).items():
        if str(wanted) in names:
            where[role] = names.index(str(wanted))
        elif wanted == ONE_USER or (str(wanted) == NOTHING and role not in ("user", "item")):
            where.pop(role, None)
        elif str(wanted).isdigit() and 1 <= int(wanted) <= len(names):
            where[role] = int(wanted) - 1
        else:
            hint = "" if header else "; there is no header (--header, if the first line is one)"
            near = nearest(str(wanted), first)  # without a header, of the words in the first line
            raise DataError(
                f"{path}: no column {wanted!r} for the {role}; the columns are {listing(names)}{hint}{near}"
            )
    if not header and columns is not None and len(names) <= len(ROLES):
        where |= _by_position(len(names), where, columns, sample)
    needed = ("item",) if (columns or {}).get("user") == ONE_USER else ("user", "item")
    if missing := [role for role in needed if role not in where]:
        fit = [name for i, name in enumerate(names) if name and not like_times(sample(i))][:2] if header else []
        named = len(missing) == len(fit) == 2
        example = f", as in {as_option(dict(zip(('user', 'item'), fit, strict=True)))}" if named else ""
        raise (NoUserError if missing == ["user"] and len(where) == len(names) else DataError)(
            f"{path}: no {' and no '.join(missing)} column; the columns are {listing(names)}; "
            f"name them with --columns user=NAME,item=NAME{example}{' (or --no-header, if these are data)' * header}"
        )
    if where.get("user") == where["item"]:
        raise DataError(f"{path}: user and item are both column {where['item'] + 1}; expected two columns")
    if header and "timestamp" not in (columns or {}) and "timestamp" not in where:
        free = [i for i, name in enumerate(names) if i not in where.values() and _names_times(name)]
        if len(free) == 1 and like_times(sample(free[0])):
            where["timestamp"] = free[0]
    return {role: Place(where[role] + 1, names[where[role]] if header else None) for role in ALL_ROLES if role in where}


def _by_position(width: int, where: Mapping[str, int], columns: Columns, sample: Sample) -> dict[str, int]:
    """The usual columns of the roles that ``columns`` does not name, where these are free and their content fits."""
    found: dict[str, int] = {}
    for i, usual in enumerate(ROLES[:width]):
        if i in where.values():
            continue
        role = usual
        if usual == "rating" and like_times(sample(i)):
            role = "timestamp" if width == 3 else NOTHING  # a last column of times behind user and item
        elif i >= 2 and not _are_numbers(sample(i)) and not (usual == "timestamp" and like_times(sample(i))):
            role = NOTHING
        if role != NOTHING and role not in columns:
            found[role] = i
    return found


def _are_numbers(values: pl.Series) -> bool:
    return all(_is_decimal(each) for each in values.drop_nulls() if each.strip())


def _names_times(name: str) -> bool:
    return bool(TIME_LIKE.search(name.split(":")[0].strip())) and not OTHER_TIMES.search(name)


def unused(
    names: list[str], header: bool, places: Mapping[str, Place], columns: Columns | None, sample: Sample
) -> tuple[str, ...]:
    """Sentences about the columns that have no role. One that looks like times is told with the option to use it."""
    used = {place.position for place in places.values()}
    free = [Place(i + 1, name if header else None) for i, name in enumerate(names) if i + 1 not in used]
    timed = []
    if "timestamp" not in places and "timestamp" not in (columns or {}):
        timed = [place for place in free if like_times(sample(place.position - 1))][:1]
    given = {role: at for role, at in (columns or {}).items() if at != ONE_USER}
    said = [f"not used: {place}, which looks like times; {as_option({**given, 'timestamp': place})}" for place in timed]
    if others := [place for place in free if place not in timed]:
        more = f" and {len(others) - FEW} more" if len(others) > FEW else ""
        said.append(f"not used: {', '.join(map(str, others[:FEW]))}{more}")
    return tuple(said)


def _by_name(path: Path, names: list[str], columns: Columns) -> dict[str, int]:
    where: dict[str, int] = {}
    for role in (role for role in KNOWN_NAMES if role not in columns):
        for known in KNOWN_NAMES[role]:
            matching = [i for i, name in enumerate(names) if plain_name(name) in known]
            if len(matching) > 1:
                twins = " and ".join(quoted(names[i]) for i in matching)
                raise DataError(f"{path}: columns {twins} could both be the {role}; choose with --columns {role}=NAME")
            if matching:
                where[role] = matching[0]
                break
    return where
