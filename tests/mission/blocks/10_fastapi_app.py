import asyncio
from fastapi import FastAPI
import httpx

app = FastAPI()

async def get_completion(message):
    async with httpx.AsyncClient() as http_client:
        response = await http_client.post(
            "https://api.openai.com/v1/chat/completions",
            headers={
                "Authorization": f"Bearer {os.getenv('OPENAI_API_KEY')}",
                "Content-Type": "application/json"
            },
            json={
                "model": "gpt-3.5-turbo",
                "messages": [{"role": "user", "content": message}]
            },
            timeout=30.0
        )
        return response.json()

@app.post("/chat")
async def chat_endpoint(request: dict):
    user_message = request.get('message', '')
    response = await get_completion(user_message)
    return {"response": response["choices"][0]["message"]["content"]}
