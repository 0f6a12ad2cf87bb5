import sqlite3
from datetime import datetime

# Initialize database
conn = sqlite3.connect('chat_history.db')
cursor = conn.cursor()
cursor.execute('''
CREATE TABLE IF NOT EXISTS conversations (
    id INTEGER PRIMARY KEY,
    user_id TEXT,
    message TEXT,
    response TEXT,
    timestamp TEXT
)
''')
conn.commit()

def save_conversation(user_id, message, response):
    timestamp = datetime.now().isoformat()
    cursor.execute(
        "INSERT INTO conversations (user_id, message, response, timestamp) VALUES (?, ?, ?, ?)",
        (user_id, message, response, timestamp)
    )
    conn.commit()

def get_user_history(user_id, limit=10):
    cursor.execute(
        "SELECT message, response FROM conversations WHERE user_id = ? ORDER BY timestamp DESC LIMIT ?",
        (user_id, limit)
    )
    return cursor.fetchall()
