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

TALK: list[tuple[Word, list[str], list[str]]] = [
    (
        ("My name is Pocket", "我叫口袋"),
        ["Who are you?", "What is your name?", "What are you called?", "May I know your name?"],
        ["你是谁？", "你叫什么？", "你叫什么名字？", "你的名字是什么？"],
    ),
    (
        ("I feel fine", "我很好"),
        ["How are you?", "How do you feel?", "Are you well today?", "How is your day?"],
        ["你好吗？", "你怎么样？", "你今天好吗？", "你今天怎么样？"],
    ),
    (
        ("I answer small questions", "我答小问题"),
        ["What can you do?", "What do you do?", "What are you good at?", "How can you help me?"],
        ["你会什么？", "你会做什么？", "你能做什么？", "你能帮我什么？"],
    ),
    (
        ("I live in a file", "我住在文件里"),
        ["Where are you?", "Where do you live?", "Where is your home?", "Where are you from?"],
        ["你在哪里？", "你住在哪里？", "你的家在哪里？", "你从哪里来？"],
    ),
    (
        ("I am a program", "我是程序"),
        ["Are you a person?", "Are you human?", "Are you a real person?", "What kind of being are you?"],
        ["你是人吗？", "你是真人吗？", "你是不是人？", "你是什么东西？"],
    ),
]

NOUNS: list[Word] = [word for words in CATEGORIES.values() for word in words]
LETTERS = "abcdefgh"
