"""The Admin API, `client.admin.organization.*` of the SDK: one table of record kinds and verbs (table), the verbs
(verbs, and people, keys, roles, limits for those with rules of their own), how things are shown (shapes), and the door.
"""
