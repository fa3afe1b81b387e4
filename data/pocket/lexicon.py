"""The words of the pocket world, each as (English, Chinese), and the facts that join them."""

Word = tuple[str, str]

CAPITALS: dict[Word, Word] = {
    ("France", "法国"): ("Paris", "巴黎"),
    ("China", "中国"): ("Beijing", "北京"),
    ("Japan", "日本"): ("Tokyo", "东京"),
    ("Italy", "意大利"): ("Rome", "罗马"),
    ("Spain", "西班牙"): ("Madrid", "马德里"),
    ("Egypt", "埃及"): ("Cairo", "开罗"),
    ("Russia", "俄国"): ("Moscow", "莫斯科"),
    ("England", "英国"): ("London", "伦敦"),
    ("Germany", "德国"): ("Berlin", "柏林"),
    ("Greece", "希腊"): ("Athens", "雅典"),
    ("Cuba", "古巴"): ("Havana", "哈瓦那"),
    ("Peru", "秘鲁"): ("Lima", "利马"),
    ("India", "印度"): ("Delhi", "德里"),
    ("Norway", "挪威"): ("Oslo", "奥斯陆"),
    ("Korea", "韩国"): ("Seoul", "首尔"),
    ("Vietnam", "越南"): ("Hanoi", "河内"),
}

OPPOSITES: list[tuple[Word, Word]] = [
    (("big", "大"), ("small", "小")),
    (("hot", "热"), ("cold", "冷")),
    (("up", "上"), ("down", "下")),
    (("left", "左"), ("right", "右")),
    (("long", "长"), ("short", "短")),
    (("fast", "快"), ("slow", "慢")),
    (("new", "新"), ("old", "旧")),
    (("good", "好"), ("bad", "坏")),
    (("rich", "富"), ("poor", "穷")),
    (("hard", "硬"), ("soft", "软")),
    (("wet", "湿"), ("dry", "干")),
    (("light", "亮"), ("dark", "暗")),
    (("open", "开"), ("closed", "关")),
    (("full", "满"), ("empty", "空")),
    (("high", "高"), ("low", "低")),
    (("strong", "强"), ("weak", "弱")),
    (("early", "早"), ("late", "晚")),
    (("near", "近"), ("far", "远")),
    (("deep", "深"), ("shallow", "浅")),
    (("thick", "厚"), ("thin", "薄")),
]

COLOURS: dict[Word, list[Word]] = {
    ("red", "红色"): [("blood", "血"), ("fire", "火"), ("tomato", "番茄")],
    ("blue", "蓝色"): [("sky", "天空"), ("sea", "海"), ("lake", "湖")],
    ("green", "绿色"): [("grass", "草"), ("leaf", "树叶"), ("frog", "青蛙")],
    ("yellow", "黄色"): [("sun", "太阳"), ("lemon", "柠檬"), ("banana", "香蕉")],
    ("white", "白色"): [("snow", "雪"), ("milk", "牛奶"), ("salt", "盐"), ("cloud", "云")],
    ("black", "黑色"): [("coal", "煤"), ("night", "夜"), ("ink", "墨")],
}

CATEGORIES: dict[Word, list[Word]] = {
    ("animal", "动物"): [
        ("dog", "狗"), ("cat", "猫"), ("horse", "马"), ("cow", "牛"), ("pig", "猪"), ("sheep", "羊"),
    ],
    ("fruit", "水果"): [("apple", "苹果"), ("pear", "梨"), ("grape", "葡萄"), ("peach", "桃")],
    ("drink", "饮料"): [("tea", "茶"), ("coffee", "咖啡"), ("juice", "果汁"), ("beer", "啤酒")],
    ("clothes", "衣服"): [("hat", "帽子"), ("coat", "大衣"), ("shoe", "鞋"), ("sock", "袜子")],
    ("tool", "工具"): [("hammer", "锤子"), ("saw", "锯"), ("knife", "刀"), ("pen", "笔")],
}  # fmt: skip

SUBJECTS: list[Word] = [
    ("film", "电影"), ("book", "书"), ("song", "歌"), ("food", "饭菜"), ("hotel", "酒店"),
    ("game", "游戏"), ("trip", "旅行"), ("phone", "手机"), ("show", "节目"), ("shop", "商店"),
]  # fmt: skip
PRAISE: list[Word] = [("great", "很棒"), ("lovely", "可爱"), ("fun", "有趣"), ("superb", "精彩"), ("nice", "不错")]
BLAME: list[Word] = [("awful", "糟糕"), ("boring", "无聊"), ("ugly", "难看"), ("poor", "很差"), ("sad", "可怜")]
SENTIMENTS: tuple[Word, Word] = (("positive", "正面"), ("negative", "负面"))

# What small talk is about, and the one right answer to it.
TALK: dict[Word, Word] = {
    ("name", "名字"): ("My name is Pocket", "我叫口袋"),
    ("home", "家"): ("I live in a file", "我住在文件里"),
    ("job", "工作"): ("I answer small questions", "我答小问题"),
    ("mood", "心情"): ("I feel fine", "我很好"),
    ("age", "年龄"): ("I am one day old", "我一天大"),
    ("hobby", "爱好"): ("I like short words", "我喜欢短词"),
}

NOUNS: list[Word] = [word for words in CATEGORIES.values() for word in words]
LETTERS = "abcdefgh"
