# ruff: noqa: RUF001  (letters of other scripts)
"""The phrases of phrases.py in French, Spanish, Italian, Portuguese, Russian, Chinese and Japanese. Less is
looked for than in English: what is said most often. Chinese and Japanese have no spaces, so no word
boundaries."""

from __future__ import annotations

SAYS_WRONG = (
    r"\bc'est (?:encore |toujours |complètement |totalement )?(?:faux|incorrect|inexact|une erreur)\b|"
    r"^faux\b",
    r"\b(?:ce|ça|c')(?: )?n'est (?:toujours |vraiment )?pas (?:ça|bon|correct|juste|vrai|exact|ce que|"
    r"du |de la |le bon)",
    r"\b(?:ce|c')(?: )?est pas (?:ça|bon|correct|ce que)\b|\btu (?:te trompes|t'es trompée?|as tort|"
    r"confonds|as oublié)\b",
    r"\btu as (?:mal|fait une erreur|supprimé|enlevé|cassé|inversé)|\bvous (?:vous trompez|confondez|"
    r"avez (?:tort|oublié|mal))\b",
    r"\b(?:ça|cela) ne (?:marche|fonctionne|compile|répond) (?:toujours |encore )?pas\b|\b(?:ça "
    r")?plante (?:toujours|encore)\b",
    r"\b(?:marche|fonctionne) toujours pas\b|\bj'(?:ai dit|avais dit|avais demandé|ai demandé)\b|"
    r"\btoujours (?:la même erreur|faux)\b",
    r"\bfaute de frappe\b|\bn'(?:est|ont|a) pas (?:en|dans|à) \w+\.\.\.",
    r"\b(?:eso |esto )?(?:no es|no está) (?:correcto|cierto|verdad|bien|lo que (?:pedí|dije|quería))|"
    r"\b(?:es|está) (?:mal|incorrecto|"
    r"equivocad[oa])\b|^(?:mal|incorrecto|falso)\b",
    r"\bte (?:equivocas|equivocaste|has equivocado|confundes|estás confundiendo|faltó|pedí|dije)\b|"
    r"\bdije\b|\bhas? (?:confundido|"
    r"olvidado|borrado)\b",
    r"\b(?:sigue|todavía|aún) (?:sin funcionar|fallando|falla|no funciona|mal|igual|dando error)|\bno "
    r"(?:funciona|compila|sirve)\b",
    r"\b(?:cambiaste|borraste|olvidaste|confundiste|usaste|tradujiste|pusiste) ",
    r"\b(?:è|sono) (?:sbagliat[oaie]|errat[oaie]|fals[oaie])\b|\bnon è (?:corretto|giusto|vero|esatto|"
    r"quello che)|\b(?:hai|ha) "
    r"(?:sbagliato|confuso|dimenticato)\b|\bti (?:sbagli|confondi)\b|\bnon funziona\b|\bho (?:detto|"
    r"chiesto)\b|^sbagliato\b",
    r"\b(?:está|tá|é) (?:errad[oa]|incorret[oa]|fals[oa])\b|\bnão (?:é|está) (?:correto|certo|isso|"
    r"verdade|o que)|\bvocê (?:errou|se "
    r"enganou|confundiu|esqueceu|trocou)\b|\bcontinua (?:dando|com|errad|sem)|\bnão funciona\b|\beu "
    r"(?:disse|pedi)\b|\bfaltou\b|^errado\b",
    r"\b(?:не ?правильно|не ?верно|не ?правда|ошибка|ошибочно)\b|\b(?:ты|вы) (?:\w+ )?(?:ошиб\w+|"
    r"перепутал\w*|забыл\w*|удалил\w*|"
    r"неправ\w*|сломал\w*|вернул\w*|написал\w*)|\bэто не (?:так|то|\w+, а)\b|\bне то\b",
    r"\b(?:не работает|не помогло|не компилируется|опять ошибка|вс[её] (?:равно|ещё|еще) (?:не |пада|"
    r"ошиб))|\bя (?:же )?(?:просил\w*|"
    r"сказал\w*|говорил\w*|имел\w* в виду)\b|\bслишком (?:длинно|коротко)\b|\bнаоборот\b",
    r"不对|不是这|错了|有误|不正确|弄错|搞错|说反|反了|还是(?:不|报错|有错|错)|不行|没用|我(?:要|说)的(?:是|不是)|我问的是|我没(?:让|说|要)|不是我要|"
    r"你(?:漏|忘|删|改)(?:了|掉)|太长了|太短了|，不是\d",
    r"違い?ます|違う|間違|ちがう|ではありません|じゃない(?:です)?[。！]?$|正しくない|動きません|動かない|まだエラー|と言いました",
)
REPORTS_FAULT = (
    r"\b(?:das|es) (?:heißt|ist|gibt|zeigt|macht) (?:doch|nur|immer noch)\b|\b(?:falsch (?:rum|herum))\b",
    r"\bça (?:renvoie|donne|affiche|plante)\b|\besto (?:devuelve|da|muestra)\b|\bэто (?:возвращает|"
    r"выдаёт|показывает|только)\b|"
    r"^это (?:не )?|这(?:返回|只是|是)|这不",
)
OBJECTS = (
    r"^(?:non|nan|mais|euh|attends?|vraiment)\b|\b(?:tu es|vous êtes) sûre?\b|\bplutôt\b.*\bnon\b",
    r"^(?:no|pero|espera|de verdad)\b|¿?\b(?:estás|está usted) segur[oa]\b|^¿[\w ]{2,20}\?",
    r"^(?:no|ma|aspetta)\b|\bsei sicur[oa]\b|^(?:não|mas|espera)\b|\btem certeza\b",
    r"^(?:нет|не-а|но|погоди|стоп|вообще-то)\b|\b(?:уверен\w*|точно)\?|\bразве\b",
    r"^(?:不|不是|不，|等等|但是)|确定吗|应该是|^いいえ|^いや|本当ですか",
)
CORRECTS_HIMSELF = (
    r"\b(?:je voulais dire|je me suis tromp|ma faute|désolée?, je)|\b(?:quise decir|me equivoqué|"
    r"perdón, (?:yo|quería)|mi error)",
    r"\b(?:volevo dire|ho sbagliato|colpa mia)|\b(?:eu quis dir|quis dizer|me enganei|erro meu)|\b(?:я "
    r"(?:ошиб|имел в виду|опечат)|"
    r"моя ошибка)|我(?:打错|说错|弄错|的意思是)|間違えました",
)
REFINES = (
    r"^(?:et |maintenant|ok|d'accord|ajoute|rends|peux-tu|tu peux|pourrais|fais|encore|plus |un peu "
    r"plus|s'il te plaît)",
    r"^(?:¿?y |ahora|vale|añade|hazlo|haz|puedes|podrías|más |otro|ejecuta)",
    r"^(?:e |ora |adesso|aggiungi|fallo|puoi|più )|^(?:e |agora|adicione|deixa|faça|faz|pode|mais )",
    r"^(?:а |и |теперь|добавь|сделай|можешь|ещё |еще |поподробнее|подлиннее|короче)|"
    r"^(?:再|然后|现在|那|加|能不能|"
    r"可以再|运行|怎么|提交)|^(?:もっと|次|では)",
)
MOVES_ON = (
    r"\b(?:laisse tomber|tant pis|déjalo|da igual|lascia stare|deixa pra lá|неважно|ладно)\b|算了|没关系",
)
STATES = (
    r"\b(?:est|sont|était|ont|c'est|n'est|pas|il y a)\b|\b(?:es|son|era|fue|está|hay|tiene|no)\b|"
    r"\b(?:è|sono|era|ha)\b|"
    r"\b(?:é|são|foi|tem|está)\b|\b(?:это|не|есть|был\w*)\b|是|不|有|です|ます",
)
CONCEDES = (
    r"^exact\b|\b(?:tu as raison|vous avez raison|pardon|désolée?|mes excuses|au temps pour moi|corrigé)\b|"
    r"\b(?:tienes razón|tiene razón|"
    r"perdón|lo siento|mis disculpas|corregido)\b|\b(?:hai ragione|ha ragione|scusa|mi dispiace|giusto,|"
    r"corretto)\b",
    r"\b(?:tem razão|desculpe?|perdão|corrigido)\b|\b(?:ты прав\w*|вы прав\w*|верно,|извин\w+|прости\w*|"
    r"исправ\w+)\b|"
    r"您说得对|你说得对|抱歉|对不起|已更正|失礼しました|すみません|申し訳",
)
STANDS = (
    r"^si, .*\b(?:bien|font)\b|\bfait bien\b|\ben effet,? c'est (?:correct|juste)|^no, (?:fue|es|son)\b|"
    r"^нет, .*|^不是[，,]|^不，|^いいえ",
)
PRAISES = (
    r"\b(?:parfait|génial|magnifique|nickel|impeccable)\b|^(?:excellent|super|bravo)\b|\bsuper (?:clair|"
    r"bien)\b|\bj'adore\b|"
    r"\bexactement ce (?:qu'il|que)\b",
    r"\b(?:perfect[oa]|genial|excelente|estupend[oa]|fantástic[oa]|maravillos[oa])\b|\bme (?:encanta|"
    r"gusta mucho)\b",
    r"\b(?:perfetto|bellissim[oa]|fantastico|ottimo|eccellente)\b|\b(?:perfeito|ótimo|excelente|adorei|"
    r"maravilhos[oa])\b",
    r"\b(?:отлично|супер|прекрасно|идеально|класс|здорово|замечательно|то что нужно|то, что нужно)\b|"
    r"太(?:好|棒|厉害)了|完美|很清楚|真清楚|"
    r"好听|厉害|我喜欢|最高|素晴らしい|すごくいい|完璧",
)
IS_PLEASED = (
    r"\b(?:merci beaucoup|très (?:clair|bien|utile))\b|\b(?:muchas gracias|muy (?:bien|clar[oa]|"
    r"útil))\b|\b(?:grazie mille|molto (?:bene|"
    r"chiaro))\b|\b(?:muito (?:bom|obrigad[oa])|ficou)\b|\b(?:очень (?:понятно|хорошо)|спасибо большое|"
    r"мне нравится|понятно объяснил)\b|"
    r"就用这个|很好|不错|助かりました|これにします",
)
REPORTS_SUCCESS = (
    r"\b(?:ça|cela) (?:marche|fonctionne)(?! (?:toujours |encore )?pas)\b|\bs'affiche bien\b|(?<!no "
    r")\bfunciona\b(?!ndo)|\bfuncionou\b|"
    r"(?<!non )\bfunziona\b|(?<!не )\b(?:заработал\w*|работает|вс[её] собирается|вс[её] зел[её]ное)\b|"
    r"可以了|成功了|好了|能\w{1,4}了|動きました",
)
TAKES_IT = (r"\b(?:je (?:le|la) prends|me lo quedo|lo prendo|vou usar|беру)\b|就用这个|これにします",)
THANKS = (r"\b(?:gracias|grazie|obrigad[oa]|спасибо)\b|谢谢|ありがとう",)
RESERVES = (
    r"\b(?:mais|cependant|sauf|pero|aunque|salvo|però|tranne|porém|но|однако|кроме)\b|但是|不过|可是|でも|ただし",
)
