"""Which column is the user, the item, the rating and the time, and whether the first line names the columns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from perfedrec.core.errors import DataError
from perfedrec.data.text import counted
from perfedrec.data.values import ROLES

Columns = Mapping[str, str | int]

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
        ),
    }.items()
}
NOTHING = "none"  # in place of a column: the file has no such role
MANY = 200  # lines that are compared with the first
NAME_LIKE = re.compile(r"[A-Za-z_#][A-Za-z0-9_ .:#/()\[\]-]*")
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


def names_role(name: str, role: str, ids: bool = False) -> bool:
    """Whether a column name is a known name of a role; a single letter does not count.

    With ``ids``, only the preferred names count, which are those of ids and not of titles.
    """
    plain, groups = plain_name(name), KNOWN_NAMES[role]
    return len(plain) > 1 and any(plain in names for names in (groups[:1] if ids else groups))


def is_header(lines: list[list[str]]) -> bool:
    """Whether the first of some lines, given as fields, names the columns.

    It does if it holds known names of a user and of an item; or if no field of it is a number and some field is a name:
    a known one, one that ends like a name of a column (customer_id), or one above a column of numbers. A field that
    occurs again in its column is no name of it. It also does if it counts the columns (0, 1, 2, ...) above ids that
    are words.
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
        if cells and all(_is_number(cell) for cell in cells if cell.strip()) and any(cell.strip() for cell in cells):
            return True
    return False


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return value.strip().lower() not in ("nan", "inf", "infinity")


def locate(path: Path, names: list[str], header: bool, columns: Columns | None) -> dict[str, Place]:
    """The place of each role that the file has.

    ``names`` are the names of all columns where there is a ``header``. ``columns`` names some columns, by name or by
    position; where a text is both, it is a name. ``none`` stands for no column. Raises
    :class:`DataError` where a column is missing, or two columns could have one role.
    """
    where: dict[str, int] = {}
    if header:
        where = _by_name(path, names, columns or {})
    elif columns is None:
        if not 2 <= len(names) <= 4:
            expected = "user item [rating [timestamp]], a header, or --columns user=1,item=2"
            raise DataError(f"{path}, line 1: has {counted(len(names))}; expected {expected}")
        where = {role: i for i, role in enumerate(ROLES[: len(names)])}
    else:
        names = [str(i + 1) for i in range(len(names))]
    for role, wanted in (columns or {}).items():
        if str(wanted) in names:
            where[role] = names.index(str(wanted))
        elif str(wanted) == NOTHING and role not in ("user", "item"):
            where.pop(role, None)
        elif str(wanted).isdigit() and 1 <= int(wanted) <= len(names):
            where[role] = int(wanted) - 1
        else:
            hint = "" if header else "; there is no header (--header, if the first line is one)"
            raise DataError(f"{path}: no column {wanted!r} for the {role}; the columns are {_listed(names)}{hint}")
    if missing := [role for role in ("user", "item") if role not in where]:
        raise DataError(
            f"{path}: no {' and no '.join(missing)} column; the columns are {_listed(names)}; "
            f"name them with --columns user=NAME,item=NAME{' (or --no-header, if these are data)' * header}"
        )
    if where["user"] == where["item"]:
        raise DataError(f"{path}: user and item are both column {where['user'] + 1}; expected two columns")
    return {role: Place(where[role] + 1, names[where[role]] if header else None) for role in ROLES if role in where}


def _listed(names: list[str]) -> str:
    return ", ".join(name or '""' for name in names)


def _by_name(path: Path, names: list[str], columns: Columns) -> dict[str, int]:
    where: dict[str, int] = {}
    for role in (role for role in KNOWN_NAMES if role not in columns):
        for known in KNOWN_NAMES[role]:
            matching = [i for i, name in enumerate(names) if plain_name(name) in known]
            if len(matching) > 1:
                twins = " and ".join(names[i] for i in matching)
                raise DataError(f"{path}: columns {twins} could both be the {role}; choose with --columns {role}=NAME")
            if matching:
                where[role] = matching[0]
                break
    return where
