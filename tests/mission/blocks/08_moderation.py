def is_safe_content(text):
    moderation_response = client.moderations.create(input=text)
    return not moderation_response.results[0].flagged

def safe_chat_completion(user_input):
    # Check user input
    if not is_safe_content(user_input):
        return "I cannot process this request as it contains inappropriate content."
    
    # Get model response
    response = client.chat.completions.create(
        model="gpt-3.5-turbo",
        messages=[{"role": "user", "content": user_input}]
    )
    model_output = response.choices[0].message.content
    
    # Check model output
    if not is_safe_content(model_output):
        return "I generated a response that may be inappropriate. Let me try a different approach."
    
    return model_output
