"""Other protocols for conversations: each makes a chat of a request, and puts the chat's answer into its words."""
