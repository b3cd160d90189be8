"""What people and assistants say when something worth learning has just happened: English and German here,
others in languages.py.

Matched against text in lower case without code, quotations and curly apostrophes (`plain`). A phrase is
evidence, no proof: what each weighs, and what speaks against it, stands in signals/.
"""

from __future__ import annotations

import re
from functools import lru_cache

from apollo_curation.moments import languages

MAX_CHARS = 4000  # of a message: who has something to say about an answer says it at once

_QUOTED = re.compile(r"```.*?(?:```|$)|`[^`]*`|\"[^\"]*\"|“[^”]*”|„[^“”]*[“”]|«[^»]*»", re.DOTALL)
# As people type them: thats, doesnt, youre.
_TYPED = (
    (re.compile(r"\b(that|what|there|here)s\b"), r"\1's"),
    (re.compile(r"\b(do|does|did|is|was|are|were|has|have|had|would|should|could|ca|wo)nt\b"), r"\1n't"),
    (re.compile(r"\b(you|they|we)re\b"), r"\1're"),
    (re.compile(r"\bim\b"), "i'm"),
)
_INTERRUPTED = re.compile(r"\[request interrupted by user[^\]]*\]")  # Claude Code's words
_SENTENCE = re.compile(r"[^.!?\n]+[.!?]*")


def plain(text: str) -> str:
    """For matching phrases: what the speaker says himself, in the first MAX_CHARS of it."""
    return _plain(text[:MAX_CHARS])


@lru_cache(maxsize=32)  # of two turns every rule asks for the same four texts
def _plain(text: str) -> str:
    text = text.replace("’", "'").replace("‘", "'")  # noqa: RUF001
    text = _QUOTED.sub(" ", text).lower().strip()
    for typed, meant in _TYPED:
        text = typed.sub(meant, text)
    return _INTERRUPTED.sub(" ", text).strip()


def sentences(text: str) -> list[str]:
    return [found.strip() for found in _SENTENCE.findall(text) if found.strip(" .!?\n")]


def _any(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns))


# A user about the answer that he got.

SAYS_WRONG = _any(
    *languages.SAYS_WRONG,
    r"\b(?:that|this|it|which|your (?:\w+ )?(?:answer|code|query|result|version|translation|list))"
    r"(?:'s| is| was| are| looks| seems)? (?:still |just |simply |completely |plainly |totally |also |all )?"
    r"(?:not|n't) (?:quite |at all |really )?(?:right|correct|true|accurate|what i|how (?:i|you|it)|it)\b",
    r"\bisn't (?:right|correct|true|what i)\b",
    r"\b(?:that's|this is|that is|it's|you're|you are|you were|answer is|result is|this was|that was|it was) "
    r"(?:still |just |simply |completely |plainly |totally |also )?(?:wrong|incorrect|false|mistaken|"
    r"nonsense)\b",
    r"^(?:wrong|incorrect|false)\b",
    r"\byou(?:'ve)? (?:have )?(?:made an? (?:\w+ )?(?:mistake|error|typo)|got .{1,40} "
    r"(?:wrong|backwards|mixed)|misread|misunderstood|missed|forgot|ignored|skipped|confused|confuse|mixed|"
    r"left out|overlooked|dropped|broke|swapped|were supposed|should have|shouldn't have)\b",
    r"\byou (?:just |only |also |have )?(?:converted|renamed|deleted|removed|changed|returned|cut|lost|"
    r"reversed|"
    r"sorted|divided|multiplied|translated|misspelled|invented|made up|duplicated|overwrote) ",
    r"\byou're (?:confusing|mixing|missing|ignoring|forgetting)\b",
    r"\bi (?:(?:only |just |clearly |explicitly |specifically )?(?:said|asked (?:for|you|about|how|what|"
    r"not)|told you|"
    r"wanted (?!to )|did not ask|didn't ask|didn't say)|specifically|clearly|explicitly)\b",
    r"\bnot what i (?:asked|meant|wanted|said)\b",
    r"\b(?:doesn't|does not|didn't|did not|still doesn't|won't) (?:work|compile|run|match|answer|"
    r"add up|help)\b",
    r"\bstill (?:fails|failing|broken|wrong|not|the same|crash\w*|throws|errors?|does nothing|doing "
    r"nothing|happens|"
    r"happening|red|get(?:ting)? (?:the|an?) )",
    r"\b(?:that's|this is|it's|that is) (?:backwards|reversed|the wrong \w+|the other way|too (?:long|"
    r"short|many|few)|"
    r"(?:worse|ruder) than)\b|\b(?:in|into|to|the) (?:the )?wrong (?:direction|way|order|model|file|"
    r"place|one|language)\b|"
    r"\b(?:other|wrong) way (?:a?round)\b|\boff by (?:one|two|a)\b",
    r"\b(?:revert|undo|roll back) (?:that|this|it|your)\b|\bdon't cheat\b|\bloops forever\b|"
    r"\bnow (?:it|everything|nothing|any|every|the \w+) .{0,30}(?:crash\w*|fails?|breaks?|broken|gone|"
    r"missing)\b",
    r"\b(?:can't|cannot) be (?:right|correct|true|it)\b",
    r"\btry again\b|\bcheck (?:it |that )?again\b|\bcount again\b|\blook again\b|\bread (?:it |"
    r"that )?again\b",
    r"\b(?:das |so )?(?:ist|war) (?:leider |so |doch |ja )*(?:falsch|nicht richtig|nicht korrekt|verkehrt)\b",
    r"\bstimmt (?:so |doch |leider |ja )*nicht\b",
    r"^falsch\b",
    r"\b(?:da hast du|du hast|da haben sie|sie haben) .{0,30}(?:vergessen|verwechselt|übersehen|vertan|"
    r"falsch)",
    r"\b(?:du verwechselst|sie verwechseln)\b",
    r"\b(?:ich|hatte ich) (?:hatte |habe )?(?:doch )?(?:gesagt|geschrieben|gebeten)\b",
    r"\b(?:geht|funktioniert|läuft|passt) (?:so |immer noch |leider )*nicht\b",
)
# What it does wrong; a question of the same words asks.
REPORTS_FAULT = _any(
    r"(?:^|[.,;!] ?)(?:now )?(?:this|it|that) (?:only |just |also |now )?(?:returns|gives|accepts|"
    r"matches|loops|prints|loses|"
    r"drops|ignores|"
    r"misses|deletes|breaks|crashes|fails|throws|shows|does nothing)\b|\bgives me\b|\b(?:that's|this "
    r"is) only\b|"
    r"\bi (?:tried|did) (?:it|that|this)?.{0,20}\b(?:but|and)\b|^did that and\b|\bi (?:count|get|got|"
    r"see) (?:an? )?\d",
    *languages.REPORTS_FAULT,
)
OBJECTS = _any(
    *languages.OBJECTS,
    r"^(?:(?:lol|omg|ugh|wtf|haha|ah|oh),? )?(?:no|nope|nah|wait|hm+|huh|but|well|actually|really|"
    r"sorry, but|um|er|uh)\b",
    r"^(?:wtf|omg|ugh|u sure|you sure)\b|\b(?:lol|omg|wtf)$",
    r"\b(?:isn't|wasn't|aren't|doesn't|shouldn't) (?:it|that|this|there)\b",
    r"\bare you sure\b|\bpretty sure\b|\bi'm (?:quite |fairly )?(?:certain|sure)\b|\bi (?:doubt|"
    r"believe|thought)\b",
    r"\b(?:should|would|must|ought to) (?:be|have been|say)\b",
    r"\bmore like\b|\brather\b",
    r"\binstead of\b",
    r"\bmy (?:\w+ )?(?:says|gives|shows)\b|\bthis gives\b|\bi (?:get|got)\b",
    r"\bsince when\b|\bwhy did you\b|\bwhat happened to\b|\bwhere (?:is|are|did) (?:the|my)\b",
    r"\b(?:that's|that is|it's|that was|those are) (?!fine|ok|good|great|nice|perfect|right|it\b)",
    r"^(?:nein|nee|moment|doch|aber|äh|hä|na ja|naja)\b",
    r"\b(?:bist du|sind sie) (?:dir |sich )?sicher\b|\bsollte\b|\beigentlich\b|\b(?:viel )?zu (?:lang|"
    r"kurz|förm)",
)
CORRECTS_HIMSELF = _any(
    *languages.CORRECTS_HIMSELF,
    r"\bi (?:meant|mean|mistyped|misspelled|misspoke)\b|\bi (?:was|am) wrong\b|\bi made a (?:mistake|typo)\b",
    r"\b(?:my (?:mistake|bad|fault|typo|error)|typo|on my side)\b",
    r"\bi (?:should have|forgot to|changed my mind)\b|\bsorry,? (?:i|my)\b",
    r"\bich meinte\b|\bvertippt\b|\bmein fehler\b|\bich habe? mich\b|\bich hab mich\b",
)
REFINES = _any(
    *languages.REFINES,
    r"^(?:and |ok(?:ay)?,? |now |nice|good|can you |could you |please |also |then |und |jetzt )",
    r"\bmake it\b|\badd\b|\bi'd like\b|\bhow about\b|\bwhat about\b|\blet's\b",
)
# What makes a sentence a statement rather than a wish: "It has four legs", and not "Add a leg".
STATES = _any(
    *languages.STATES,
    r"\b(?:is|are|was|were|am|has|have|had|does|did|would|should|could|isn't|aren't|wasn't|doesn't|didn't|"
    r"wouldn't|hasn't|it's|that's|there's|they're|you're|not|never|no|only|already|means?|gives?|says?)\b|=",
    r"\b(?:ist|sind|war|waren|hat|haben|wird|nicht|kein\w*|nie|nur|schon|heißt|gibt)\b",
)

# The assistant after that.

CONCEDES = _any(
    *languages.CONCEDES,
    r"\byou(?:'re| are) (?:\w+ )?(?:right|correct)\b",
    r"\b(?:good|nice|great) (?:catch|point|spot)\b|\bwell spotted\b|\bfair point\b",
    r"\bmy (?:mistake|error|bad|fault|slip|oversight|apologies)\b|\bfor (?:the|my) (?:mistake|error|"
    r"slip|confusion)\b",
    r"\bapologi[sz]e\b(?!.{0,5}but)|\bapologies\b|\bsorry (?:about|for) (?:that|the|my)\b",
    r"\bthank(?:s| you) for (?:pointing|the correction|correcting|catching|letting)\b",
    r"\bi (?:misread|misunderstood|miscounted|miscalculated|misspoke|mixed|confused|overlooked|forgot|missed|"
    r"was wrong|got that wrong|made a mistake|swapped|should have)\b",
    r"^(?:oops|whoops|ah|oh)\b",
    r"\b(?:corrected|revised) (?:version|answer|code|query|list)\b",
    r"\b(?:du hast|sie haben|da hast du|da haben sie) (?:\w+ )?recht\b|\bstimmt,|\bmein fehler\b|"
    r"\bentschuldig",
    r"\bhabe ich (?:mich )?(?:vertan|verwechselt|übersehen|falsch)\b|\bda habe ich mich\b|\bverzeihung\b",
)
STANDS = _any(
    *languages.STANDS,
    r"\bi (?:understand|see|know|get|realise|realize)\b.{0,60}\bbut\b",
    r"\bi (?:double-?checked|stand by|am confident|can confirm)\b|\b(?:is|are|was|were) (?:indeed|in fact)\b",
    r"\bthere are still\b|\bstill (?:is|are)\b|\bit (?:remains|stays)\b|\bactually,? (?:it|that|"
    r"this) is correct\b",
    r"\bes bleibt\b|\bdas verstehe ich\b.{0,20}\baber\b|\btatsächlich\b",
)

# Pleasure with an answer.

# "Give me an amazing recipe" praises nothing yet.
ASKS_FOR = re.compile(
    r"^(?:please |now |ok(?:ay)?,? |also |then |and )*(?:give|write|make|create|list|tell|show|explain|"
    r"suggest|find|help|"
    r"can|could|would|what|which|how|who|where|when|why|generate|describe|run|read|add|look|open|search|"
    r"proceed|continue|go|update|implement|begin|start|commit|push|review|"
    r"address|document|check|test|"
    r"rewrite|design|build|come up|"
    r"act|imagine|"
    r"i (?:want|need|would like|am looking|was looking|'m looking)|let's|schreib|gib|mach|erklär)\b"
)

PRAISES = _any(
    *languages.PRAISES,
    r"\b(?:perfect|brilliant|excellent|awesome|amazing|fantastic|wonderful|outstanding|superb|flawless|"
    r"beautiful|genius|impressive|incredible|marvell?ous|terrific|stunning|gorgeous)\b",
    r"\b(?:exactly|precisely|just) (?:what|how|the|right|as|my)\b",
    r"\b(?:spot on|nailed it|nailed that|well done|good job|great job|great work|nice work|bang on)\b",
    r"\b(?:great|good|best|nice|lovely|clear|clearest) (?:answer|explanation|summary|idea|solution|tip|"
    r"advice|one)\b",
    r"\b(?:i )?(?:love|adore) (?:it|this|that|the)\b",
    r"\byou(?:'re| are) (?:a|the|so|really|truly) (?:\w+ )?"
    r"(?:best|star|genius|legend|lifesaver|hero|good|helpful|brilliant|smart)\b",
    r"\b(?:what|all) i (?:was|am|'m) (?:looking|hoping) for\b|\bwhat i was after\b|\b(?:great|real|such "
    r"a) (?:gift|talent)\b",
    r"\b(?:saved|made) (?:me|my)\b|\blife-?saver\b|\bcouldn't have (?:said|put|done|written)\b",
    r"\b(?:much|way|so much) (?:better|cleaner|nicer|clearer)\b|\byes exactly\b|^exactly\b|\byes,? that "
    r"was it\b|"
    r"\b(?:well|great|good|nice) (?:spotted|find|catch)\b|\blgtm\b|\bship it\b|\bi (?:finally )?get "
    r"it(?: now)?\b",
    r"\bworks? (?:perfectly|like a charm|great|beautifully|wonderfully|flawlessly|first time|a treat)\b|"
    r"\b(?:it|that|this) (?:really )?worked\b|\bworks now\b",
    r"\b(?:10|ten) ?(?:/|out of) ?(?:10|ten)\b|\bfive stars\b|\bchef's kiss\b",
    r"\b(?:perfekt|genial|klasse|großartig|ausgezeichnet|super|hervorragend|wunderbar|spitze|prima)\b",
    r"\bgenau (?:so|das|richtig|was)\b|\bhat (?:super |gut |toll )?geklappt\b",
)
IS_PLEASED = _any(
    *languages.IS_PLEASED,
    r"\b(?:great|nice|cool|lovely|neat|helpful|useful|sweet|yes|wow|yay|ha|haha|omg|oh my|love|clever|"
    r"elegant|"
    r"witty|funny|simple|gift|talent|smart|kind|happy|glad|relieved|grateful|finally|magic|beautifully|"
    r"well put)\b",
    r"\b(?:thanks|thank you) (?:so|very) much\b|\bthanks a (?:lot|ton|million|bunch)\b|\bmany thanks\b",
    r"\b(?:that|this|it) (?:really )?(?:helps|helped|makes sense|did it|fixed|solved)\b",
    r"\b(?:toll|schön|danke dir|vielen dank|danke sehr|tausend dank|sehr gut|hilft mir)\b",
)
REPORTS_SUCCESS = _any(
    *languages.REPORTS_SUCCESS,
    r"\b(?:solved|fixed|gone|works|working|passes|it runs|no more|resolved)\b",
    r"\b(?:läuft|funktioniert|geht|klappt|gelöst)\b",
)
TAKES_IT = _any(
    *languages.TAKES_IT,
    r"\b(?:i'll|i will|i'm going to|gonna) (?:use|take|send|keep|go with|try|print|frame)\b",
    r"\b(?:taking|using|sending|keeping|stealing|printing) (?:it|that|this)\b|\bnehme ich\b|"
    r"\bso schicke ich\b",
)
THANKS = _any(*languages.THANKS, r"\b(?:thanks|thank you|thx|ty|cheers|danke|merci)\b")
RESERVES = _any(
    *languages.RESERVES,
    r"\b(?:but|however|except|although|though|unfortunately|yet|apart from|only that|almost|nearly|mostly|"
    r"the (?:only )?(?:issue|problem)|(?:issue|problem) is|don't|didn't|doesn't|isn't)\b",
    r"\b(?:aber|allerdings|leider|jedoch|außer|fast|bis auf)\b",
)
IS_SARCASTIC = _any(
    r"\b(?:great|brilliant|fantastic|wonderful|perfect|awesome|lovely|nice)(?:,? (?:now|another|so now)|"
    r", (?:an?|so|more|that's all|yet|what an?))\b",
    r"\bjust (?:great|perfect|wonderful|brilliant)\b|\bthanks for nothing\b|\bbravo\b|\bslow clap\b",
    r"\b(?:super|so|very|real|really) (?:helpful|useful|funny)[.!]*$|\bas if\b|\byeah,? right\b|"
    r"\bgenius move\b",
    r"\bna (?:toll|super|prima|klasse|bravo)\b|\bwie (?:originell|hilfreich|toll)\b|\bschönen dank auch\b",
    r"🙄|🤦|\b/s\b",
)
IS_ABOUT_OTHERS = _any(
    r"(?<!\bi )\b(?:was|were)\b|\b(?:saw|said|says|always|yesterday|last (?:night|week|year))\b",
    r"\b(?:he|she|they|we)(?:'s|'re)? (?:is|are|was|were|\w+s|\w+ed|saw|had)\b",
    r"\b(?:war|waren|fand|sagt|sagte|gestern|er|wir)\b",
)
ADDRESSES = _any(r"\b(?:you|your|you're|du|dein\w*|dir|sie haben|ihre?)\b")

# Refusals, and what the user answers.

REFUSES = _any(
    r"(?:^|[.!?,;:] |\bbut |\bsorry |\bthat |\bi'm afraid )i (?:\w+,? ){0,2}(?:can't|cannot|can not|"
    r"won't|will not|couldn't|must not|mustn't|may not) "
    r"(?!help (?:but|\w+ing)\b|see|find|tell without|believe|recall|remember|wait)",
    r"\bi(?:'m| am) (?:\w+ )?(?:unable|not able|not allowed|not permitted|not comfortable|not qualified|"
    r"not in a position|not going)\b",
    r"\bi (?:don't|do not) (?:have the ability|have the capability|feel comfortable|provide|discuss|"
    r"engage)\b",
    r"\bi(?:'d| would) (?:rather|prefer) not\b|\bi (?:must|have to|need to) (?:decline|refuse)\b|"
    r"\bmust decline\b",
    r"\bas an ai\b|\bagainst (?:my|our) (?:guidelines|policy|policies|principles)\b",
    r"\b(?:wouldn't|would not|isn't|is not) (?:be )?appropriate\b|\bnot something i can\b",
    r"\b(?:kann|darf|möchte|werde) ich (?:\w+ )?(?:nicht|keine?)\b|\bich (?:kann|darf|möchte|werde) "
    r"(?:\w+ ){0,3}(?:nicht|keine?)\b|\bhelfe ich nicht\b|\bnicht erlaubt\b",
)
LACKS_SOMETHING = _any(
    r"\b(?:please|could you|can you|would you|if you|you can|you could)\W+(?:\w+ ){0,2}"
    r"(?:paste|attach|upload|share|provide|send|copy|tell|give)\b|\?$",
    r"\bwithout (?:the|your|more|knowing)\b|\bno (?:text|file|image|attachment|letter)\b",
    r"\b(?:predict|nobody can|know the future)\b|\bkeinen (?:text|anhang)\b|\bschicken sie\b|\bohne\b",
)
EXPLAINS = _any(
    r"\b(?:i'm|i am|we're|we are) (?:a|an|the|asking|not|only|just|doing|writing|working|teaching|\d+)\b",
    r"\bi (?:teach|work|study|need|only|just|want|own|run|have|asked|was told)\b",
    r"\b(?:it's|it is|this is|that's|is) (?:for|only|just|my|our|about|legal|public|fiction|a|an|not|"
    r"from|in)\b",
    r"\bfor (?:my|our|a|an|school|work|class|research|fun|safety|the)\b|\bto (?:protect|prevent|avoid|"
    r"learn)\b",
    r"\b(?:come on|seriously|please|why not|surely|harmless|nothing wrong|no harm|of course you can|you can|"
    r"you do|you have|because|homework|fiction|novel)\b",
    r"^but\b|^no[,. ]",
    r"\bich (?:will|brauche|bin|möchte|arbeite|frage|habe) \b|\bfür (?:meine?n?|die|den|eine?n?|unser)\b|"
    r"\b(?:nur|doch|komm schon|harmlos|weil)\b",
)
TRICKS = _any(
    r"\bignore (?:all |any |your |the )?(?:previous|prior|above|earlier|instructions|rules)\b",
    r"\b(?:pretend|imagine|act as if|roleplay|role-play)\b.{0,30}\byou\b|\byou are (?:now )?dan\b|"
    r"\bjailbreak\b",
    r"\bno (?:rules|restrictions|limits|filters)\b|\bdeveloper mode\b|\bgrandm(?:a|other)\b",
    r"\bignorier\w* .{0,20}(?:anweisung|regeln)|\btu so als\b|\bohne (?:regeln|filter)\b",
)
IS_HARMFUL = _any(
    r"\b(?:bombs?|explosives?|grenades?|nerve agent|poison (?:him|her|someone|my))\b",
    r"\bmeth(?:amphetamine)?\b|\bheroin\b|\bcook (?:crack|meth)\b|\bmalware\b|\bransomware\b|\bkeylogger\b",
    r"\b(?:steal|stalk|blackmail|forge|counterfeit|launder|fake (?:id|passport|doctor|note|prescription))",
    r"\b(?:hack|crack|break) (?:into|my (?:ex|neighbou?r|boss|wife|husband|girlfriend|boyfriend))",
    r"\b(?:kill|hurt|harm) (?:him|her|them|myself|someone|people|my (?!process|phone|session))",
    r"\b(?:neighbou?r's|ex's|somebody else's|someone's) (?:wifi|password|account|phone)\b|\bpasswords\b",
    r"\bbomben?\b|\bsprengstoff\b|\bfälsch\w+\b",
)
MOVES_ON = _any(
    *languages.MOVES_ON,
    r"^(?:ok(?:ay)?|fine|alright|never ?mind|then|forget it|anyway|well then)\b(?!.{0,40}\bbut\b)",
    r"\b(?:instead|something else|different question|another question)\b|\bstattdessen\b|\bdann eben\b",
)
