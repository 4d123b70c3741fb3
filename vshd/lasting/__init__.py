"""vshd.lasting: sessions that outlive their clients, each in a process of its own."""
