# Simplified RAG implementation
def retrieve_relevant_documents(query):
    # Use embeddings to find relevant documents
    query_embedding = client.embeddings.create(
        model="text-embedding-ada-002",
        input=query
    ).data[0].embedding
    
    # Retrieve documents with similar embeddings
    relevant_docs = vector_db.search(query_embedding, top_k=3)
    return relevant_docs

def answer_with_context(query):
    # Get relevant documents
    docs = retrieve_relevant_documents(query)
    context = "\n\n".join([doc.text for doc in docs])
    
    # Create prompt with context
    messages = [
        {"role": "system", "content": "Answer based on the following context only."},
        {"role": "user", "content": f"Context: {context}\n\nQuestion: {query}"}
    ]
    
    # Get response
    response = client.chat.completions.create(
        model="gpt-4",
        messages=messages
    )
    
    return response.choices[0].message.content
